"""The bench by its command: the file it leaves, by its contract, and what it refuses."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from harmony import bench
from harmony.config import compose
from harmony.errors import UserError
from harmony.models.kit import Kit


def test_the_command_writes_its_figures(random_kit, tmp_path, monkeypatch, capsys):
    """Guards the contract of bench.json: <what>/<kit>/<device>/<figure>; bare words say what is measured."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["train", "memory", f"model.path={random_kit}", "batch=2", "steps=1", "blocks=1", f"paths.runs={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    bench.main()
    (folder,) = (tmp_path / "bench").iterdir()
    flat = json.loads((folder / "bench.json").read_text())
    for figure in ("ours", "reference", "ratio", "ratio_min", "ratio_max", "tflops", "share_of_peak"):
        assert flat[f"train/{random_kit}/cpu/{figure}"] > 0
    assert flat[f"memory/{random_kit}/cpu/counted_plain_64"] > 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(folder / "bench.json") and any(line.startswith("| train |") for line in said)
    assert json.loads((folder / "provenance.json").read_text())["device"]


def test_what_is_measured_on_a_gpu(random_kit, tmp_path, monkeypatch):
    """Guards gpu_all: each part with its own batch, which names its figures; what runs without a GPU runs."""
    cfg = compose("bench", [f"model.path={random_kit}", "what=[gpu_all]", "blocks=1", f"paths.work={tmp_path}"])
    with pytest.raises(UserError, match="gpu_all wants a GPU"):
        bench.plan(cfg, Kit(str(random_kit)))
    parts = bench.plan(cfg, SimpleNamespace(device=torch.device("cuda")))
    assert [part for part, *_ in parts] == ["train", "train", "train", "joint", "sample", "memory"]
    assert all(asked.compile and asked.sampling.steps == 50 for _, asked, _ in parts)
    found, kit = {}, Kit(str(random_kit))
    for part, asked, named in parts[1:2] + parts[3:5]:
        asked.compile, asked.sampling.steps, asked.batch, asked.steps = False, 2, asked.batch // 8, 1
        found |= bench.measured(part, asked, kit, named)
    assert {"train_b1", "joint_b4", "sample", "sample_near"} <= set(found)
    assert all(figures["ratio"] > 0 for figures in found.values())
    assert bench.table(found).count("\n") == len(found) + 1


@pytest.mark.parametrize(
    "word, line",
    [
        ("speed", "speed cannot be measured: choose among"),
        ("gpu_all", "wants a GPU"),
        ("steps=0", "steps=0: give a whole number of 1 or more"),
        ("sampling.batch=two", "sampling.batch=two: give a whole number"),
        ("sampling.modes=[graphs]", "sampling.modes=graphs: choose among unipc"),
    ],
)
def test_what_cannot_be_measured_is_said(random_kit, tmp_path, monkeypatch, capsys, word, line):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", word, f"model.path={random_kit}", f"paths.runs={tmp_path}"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("harmony: error:") and line in said
