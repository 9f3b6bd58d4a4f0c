"""What a hostile or unlucky user tried by hand: each input ends in one line, and nothing of his is overwritten."""

import json
import os
import shutil

import numpy as np
import pytest

from harmony.core.errors import UserError
from harmony.core.foreign import read_text
from harmony.harmonize import main as harmonize
from harmony.models.controlnet import check_parameters, to_cells
from harmony.models.shipped import ASSETS
from harmony.pixels.composites import place
from harmony.pixels.images import write_image
from harmony.training.export import copy_controlnet
from harmony.training.run_folder import RunFolder


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A photograph, a mask, and the current folder in which they lie."""
    rng, mask = np.random.default_rng(0), np.zeros((60, 90), bool)
    mask[20:40, 30:50] = True
    write_image(tmp_path / "c.png", rng.integers(0, 256, (60, 90, 3)).astype(np.uint8))
    write_image(tmp_path / "m.png", mask)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refuse(desk, monkeypatch, capsys):
    """``refuse(words)``: the one line in which harmonize ends with exit code 2."""

    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["harmonize", *words])
        with pytest.raises(SystemExit) as end:
            harmonize()
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(lines) == 1, lines
        return lines[0]

    return run


ONE = ("method=reinhard", "composite=c.png", "mask=m.png")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*ONE, "output=/proc/x"), "/proc/x"),
        ((*ONE, "output=" + "x" * 300), "too long"),
        ((*ONE, "output=loop"), "loop"),
        ((*ONE, "output=c.png"), "choose another folder"),
        (("background=c.png", "foreground=c.png", "mask=m.png", "box=0,0,1e12,1e12"), "give a smaller one"),
        (("background=c.png", "foreground=c.png", "mask=m.png", "box=-1e9,-1e9,1e9,1e9"), "give a smaller one"),
        (("composite=c.png", "mask=m.png", "prompt=\udcff"), "prompt="),
    ],
)
def test_what_a_file_system_refuses_is_one_line(refuse, desk, words, said):
    (desk / "loop").symlink_to("loop")
    before = sorted(p.name for p in desk.iterdir())
    assert said in refuse(*words)
    assert sorted(p.name for p in desk.iterdir()) == before, "nothing is left behind"


def test_no_input_is_overwritten(refuse, desk):
    shutil.move(desk / "m.png", desk / "hole.png")
    before = (desk / "hole.png").read_bytes()
    assert "would overwrite hole.png" in refuse("method=reinhard", "composite=c.png", "mask=hole.png", "output=.")
    assert (desk / "hole.png").read_bytes() == before


def test_names_of_ours_and_wrong_rows_are_left_out(desk, monkeypatch, capsys):
    """Guards the folder: a row with an id of ours or a gigantic box does not end the others."""
    header = "id,composite,mask,background,foreground,bbox,foreground_mask\n"
    rows = "good,c.png,m.png,,,,\nsheet.png,c.png,m.png,,,,\nhuge,,,c.png,c.png,0 0 1e12 1e12,m.png\n"
    (desk / "index.csv").write_text(header + rows)
    monkeypatch.setattr("sys.argv", ["harmonize", "dir=.", "output=out", "method=reinhard"])
    harmonize()
    out = capsys.readouterr().out
    assert "sheet.png" in out and "huge left out: box" in out
    assert (desk / "out" / "good" / "harmonized.png").exists() and (desk / "out" / "sheet.png").is_file()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "hint.json")
    with pytest.raises(UserError, match="it is no file"):
        read_text(tmp_path / "hint.json")


def test_an_object_far_larger_than_the_picture_is_refused_before_it_is_enlarged():
    image, mask = np.zeros((10, 10, 3), np.uint8), np.ones((10, 10), bool)
    with pytest.raises(UserError, match="makes the object 2000 x 2000"):
        place(image, mask, (0, 0, 2000, 2000), 100, 100)
    assert place(image, mask, (0, 0, 700, 700), 100, 100)[1].all()


@pytest.mark.parametrize(
    "parameters", [{"blur": float("nan")}, {"blur": 1e308}, {"blur": -1}, {"normalize": 3}, {"surroundings": "yes"}]
)
def test_parameters_of_a_hint_are_checked(parameters):
    with pytest.raises(ValueError, match="takes no"):
        check_parameters("color", parameters)
    check_parameters("color", {"blur": 40, "normalize": True, "surroundings": True})
    check_parameters("raw", {"surroundings": True})
    check_parameters("structure", {"low": 100, "high": 200, "edge_source": "masked"})


@pytest.mark.parametrize("sigma", [10**400, True, -1, 513, float("nan"), "10", None])
def test_lengths_of_old_hints_are_checked(sigma):
    """Guards ``sigma`` of version 0.1, which is converted before it is checked."""
    with pytest.raises(ValueError, match="takes no sigma="):
        to_cells({"sigma": sigma})
    with pytest.raises(ValueError, match="takes no sigma="):
        to_cells({"sigma": 10, "blur": 1})


def test_what_nobody_can_load_is_not_exported(tmp_path):
    """Guards the default export, which copies files: damaged weights are refused, and the run's own file is named."""
    source = tmp_path / "run" / "export" / "controlnet"
    shutil.copytree(ASSETS / "color" / "controlnet", source)
    (source.parent.parent / "config.yaml").write_text("name: color\n")
    weights = source / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="run/export/controlnet"):
        copy_controlnet(RunFolder(tmp_path / "run"), tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out" / "controlnet").exists()
    assert json.loads((source / "hint.json").read_text())["branch"] == "color"
