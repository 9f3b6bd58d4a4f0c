"""A bare GPU machine has PyTorch and its like, and none of the libraries that prepare a dataset, watch or draw: what
runs there on a dataset that has travelled loads nothing that it does not use.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harmony import fit
from harmony.pixels.images import write_image

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("fiftyone", "wandb", "polars", "gradio", "mitsuba", "matplotlib", "sklearn", "pandas", "accelerate")
CONCEPT = ROOT / "datasets" / "editing" / "concepts" / "teal_mug"
CONTROL = ["evaluate.limit=2", "evaluate.steps=1", "callbacks.samples.steps=1", "+callbacks.samples.count=2"]
TRAININGS = {
    "color": CONTROL,
    "joint": ["evaluate=null", "callbacks.samples=null"],
    "paint_by_example": ["evaluate=null", "callbacks.samples=null", "data.hints.exemplar.size=32"],
    "textual_inversion": ["token='<mug>'", "init=car", f"dataset.dir={CONCEPT}", "data.previews=2", "module.steps=1"],
}
HIDE = f"""
import importlib.metadata, sys
absent = {ABSENT}
sys.modules.update(dict.fromkeys(absent))  # None: neither to be imported nor to be seen
original = importlib.metadata.Distribution.from_name.__func__

def from_name(cls, name):
    if name in (*absent, "scikit-learn"):
        raise importlib.metadata.PackageNotFoundError(name)
    return original(cls, name)

importlib.metadata.Distribution.from_name = classmethod(from_name)
"""
EACH = """
import sys
from importlib import import_module
from harmony.cli.compose import compose
for command in sys.argv[1:]:
    print(command.split())
    name, *words = command.split("\\n")
    import_module(f"harmony.{name}").main(compose(name, words))
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory, random_backbone, prepared_work):
    """A folder with a prepared dataset, and the environment in which ``ABSENT`` is not installed."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "trap").mkdir()
    (folder / "trap" / "sitecustomize.py").write_text(HIDE)  # which every Python reads first
    for name in ("color", "paint_by_example"):
        prepared_work(folder / "work", [f"experiment={name}"])
    path = os.pathsep.join(map(str, (folder / "trap", ROOT)))
    return folder, {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(machine, *command: str) -> None:
    """Python with a command line, which must end well."""
    folder, environment = machine
    options = {"env": environment, "cwd": folder, "capture_output": True, "text": True, "timeout": 300}
    ended = subprocess.run([sys.executable, *command], **options)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]


def run_each(machine, *commands: list[str]) -> None:
    """``harmony.NAME`` with its words, one command after another in one process that loads each library once."""
    run(machine, "-c", EACH, *map("\n".join, commands))


def test_the_libraries_are_not_there(machine):
    code = "import importlib.util, sys; sys.exit(any(map(importlib.util.find_spec, sys.argv[1:])))"
    run(machine, "-c", code, *ABSENT)


def test_trainings(machine, random_backbone):
    fixed = [
        f"model.path={random_backbone}", "trainer.accelerator=cpu", "trainer.max_steps=1",
        "trainer.val_check_interval=1",
        "data.batch_size=2", "logger=none", "paths.work=work", "paths.runs=runs",
    ]  # fmt: skip
    run_each(machine, *(["fit", f"experiment={n}", f"name={n}", *fixed, *more] for n, more in TRAININGS.items()))
    for name in TRAININGS:
        (metrics,) = (machine[0] / "runs" / name).glob("*/metrics.json")
        assert json.loads(metrics.read_text())


def test_what_was_trained_is_used(machine, random_backbone):
    """Guards figures of one ControlNet and of a study, insertion, editing, and the benches."""
    folder, rng = machine[0], np.random.default_rng(0)
    write_image(folder / "b.png", rng.integers(0, 256, (48, 70, 3), dtype=np.uint8))
    write_image(folder / "m.png", np.pad(np.ones((20, 25), bool), ((15, 13), (20, 25))))
    small = ["limit=2", "steps=1", "logger=none", "paths.work=work", "paths.runs=runs"]
    prompts = ["source='a red car on snow'", "target='a blue car on snow'"]
    sizes = ["batch=1", "steps=1", "blocks=1", "sampling.steps=1", "sampling.batch=1"]
    run_each(
        machine,
        ["evaluate", "name=one", *small],
        ["evaluate", "experiment=table1", "name=study", *small],
        ["harmonize", "composite=b.png", "mask=m.png", "prompt='a cat'", "steps=1", "output=inserted"],
        ["edit", "image=b.png", *prompts, "steps=1", "inner=0", "output=edited"],
        ["bench", "what=[train,sample,memory]", f"model.path={random_backbone}", *sizes],
    )
    assert (folder / "inserted" / "harmonized.png").exists() and (folder / "edited" / "edit.png").exists()
    assert all(list((folder / "runs" / name).glob("*/metrics.json")) for name in ("one", "study"))


def test_a_logger_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    """Guards the default logger: one line, before anything is prepared or written."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["harmony.fit", "experiment=color"])
    with pytest.raises(SystemExit) as left:
        fit.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and "wandb is not installed" in line and "logger=none" in line
    assert not list(tmp_path.iterdir())
