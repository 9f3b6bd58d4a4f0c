"""The bench by its command: the file it leaves, by its contract, and what it refuses."""

import json
import sys

import pytest

from harmony import bench


def test_the_command_writes_its_figures(random_backbone, tmp_path, monkeypatch, capsys):
    """Guards the contract of bench.json: <what>/<backbone>/<device>/<figure>; bare words say what is measured."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = [
        "train",
        "memory",
        f"model.path={random_backbone}",
        "batch=2",
        "steps=1",
        "blocks=1",
        f"paths.runs={tmp_path}",
    ]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    bench.main()
    (folder,) = (tmp_path / "bench").iterdir()
    flat = json.loads((folder / "bench.json").read_text())
    for figure in ("ours", "reference", "ratio", "ratio_min", "ratio_max", "tflops", "share_of_peak"):
        assert flat[f"train/{random_backbone}/cpu/{figure}"] > 0
    assert flat[f"memory/{random_backbone}/cpu/counted_plain_64"] > 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(folder / "bench.json") and any(line.startswith("| train |") for line in said)
    assert json.loads((folder / "provenance.json").read_text())["device"]


@pytest.mark.parametrize(
    "word, line",
    [
        ("speed", "speed cannot be measured: choose among"),
        (["gpu", "train"], "gpu measures the other parts itself"),
        ("limit=soon", "limit=soon: give a whole number"),
        ("steps=0", "steps=0: give a whole number from 1 to 999"),
        ("sampling.batch=two", "sampling.batch=two: give a whole number"),
        ("sampling.modes=[graphs]", "sampling.modes=graphs: choose among unipc"),
    ],
)
def test_what_cannot_be_measured_is_said(random_backbone, tmp_path, monkeypatch, capsys, word, line):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = [word] if isinstance(word, str) else word
    monkeypatch.setattr(sys, "argv", ["bench", *words, f"model.path={random_backbone}", f"paths.runs={tmp_path}"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("harmony: error:") and line in said
