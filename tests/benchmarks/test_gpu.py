"""What ``make gpu`` runs: commands that exist, hard limits, and results that are written as they come."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass

import psutil
import pytest
from omegaconf import OmegaConf

from harmony.benchmarks.gpu import (
    ROOT,
    Part,
    find_gpu_tests,
    list_parts,
    measure_difference,
    run_parts,
    write_composite,
)
from harmony.cli.compose import compose
from harmony.cli.explain import missing_keys
from harmony.edit import overrides as edit_overrides
from harmony.fit import overrides as fit_overrides
from harmony.harmonize import overrides as harmonize_overrides
from harmony.pixels.images import read_image

READ = {"fit": fit_overrides, "harmonize": harmonize_overrides, "edit": edit_overrides}


def test_a_bare_machine_can_collect_the_gpu_tests():
    """Guards ``make gpu`` where polars, FiftyOne and notebooks are missing, as on the first GPU that was tried."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['polars', 'fiftyone', 'nbformat', 'wandb'])); import pytest;"
        f"sys.exit(pytest.main(['-q', '--collect-only', '-m', 'gpu', *{find_gpu_tests()!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(f"{name}.py" in result.stdout for name in ("test_guidance", "test_timing"))


@pytest.mark.parametrize("gpu", [True, False])
def test_every_part_is_a_command_that_composes(tmp_path, gpu):
    """Guards the list: no part names an option, experiment or file that is not there; without a GPU graphs are left
    out, and so is what measures.
    """
    write_composite(tmp_path)
    chosen = [part for part in list_parts(tmp_path) if gpu or part.cpu is not None]
    assert len({part.name for part in chosen}) == len(chosen) > 10
    for part in chosen:
        program, *words = part.build_command(tmp_path, gpu)[2:]
        if program == "pytest":
            continue
        command = program.removeprefix("harmony.")
        if command == "bench":
            words = [f"what=[{words[0]}]", *words[1:]]
        cfg = compose(command, READ.get(command, list)(words))
        known = OmegaConf.to_container(cfg, resolve=False)
        assert not list(missing_keys(known)), part.name
        for name in ("composite", "mask", "image"):
            if isinstance(known.get(name), str):
                assert read_image(known[name]).shape[2] == 3
    if not gpu:
        assert not any("graphs=true" in part.words or part.alone for part in chosen)


@dataclass(frozen=True)
class Script(Part):
    """A part that runs Python."""

    code: str = ""

    def build_command(self, folder, gpu):
        return [sys.executable, "-c", self.code]


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf])
open(os.environ["CHILD"], "w").write(str(child.pid))
time.sleep(600)
"""


def test_a_part_that_hangs_ends_and_the_next_begins(tmp_path, monkeypatch):
    """Guards the limits: what ignores every signal goes with its children; what failed, was skipped and was not reached
    says so, and the file knows it after each part.
    """
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    monkeypatch.setattr("harmony.benchmarks.gpu.GRACE", 1)
    known = []
    chosen = [
        Script("good", (), 60, code="print('well')"),
        Script("bad", (), 60, code="raise SystemExit(3)"),
        Script("graph", (), 60, cpu=None, code="raise SystemExit(4)"),
        Script("hangs", (), 3, alone=True, code=STUBBORN),
        Script("late", (), 60, alone=True, code="pass"),
    ]
    began = time.monotonic()

    def say(line):
        known.append([entry["name"] for entry in json.loads((tmp_path / "parts.json").read_text())])

    monkeypatch.setattr("harmony.benchmarks.gpu.write_composite", lambda folder: time.sleep(0))
    outcomes = run_parts(chosen, tmp_path, False, 2, total=3600, say=say)
    states = {o.name: o.status for o in outcomes}
    assert states["good"] == "ended" and states["bad"] == "failed (3)" and states["hangs"] == "killed after 3 s"
    assert states["graph"] == "skipped: wants a GPU" and states["late"] == "ended"
    assert time.monotonic() - began < 60 and (tmp_path / "good.log").read_text() == "well\n"
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert known[-1] == [part.name for part in chosen] and "hangs" not in known[0]
    assert "| bad | failed (3) |" in (tmp_path / "table.md").read_text()
    (unreached,) = run_parts([chosen[-1]], tmp_path, False, 1, total=0, say=say)
    assert unreached.status == "not reached"


def test_what_graphs_change_is_compared(tmp_path):
    """Guards the comparison: the largest difference of two pictures, and nothing where one is missing."""
    write_composite(tmp_path)
    composite = read_image(tmp_path / "composite.png")
    assert read_image(tmp_path / "mask.png").any() and measure_difference(tmp_path, "near") is None
    from harmony.pixels.images import write_image

    for name, image in (("near", composite), ("near_graphs", 255 - composite)):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "harmonized.png", image)
    expected = abs(2 * composite.astype(int) - 255).max()
    assert measure_difference(tmp_path, "near") == expected
