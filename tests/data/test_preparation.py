"""Each layout has one way from its recipe to what is read."""

import re
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from harmony.cli.compose import compose
from harmony.core.errors import UserError
from harmony.data import preparation
from harmony.data.sources import editing
from harmony.pixels.images import write_image

ROOT = Path(__file__).resolve().parents[2]


def test_every_recipe_has_a_layout_that_exists():
    """Guards the table: each bundled recipe names one of its layouts, and no layout is there for nothing."""
    recipes = [OmegaConf.load(file) for file in (ROOT / "datasets").glob("*/recipe.yaml")]
    assert {recipe.layout for recipe in recipes} == set(preparation.LAYOUTS)


@pytest.mark.parametrize("command", [preparation.prepare, preparation.ensure])
def test_an_unknown_layout_is_refused(command, tmp_path):
    """Guards the one line: what is wrong and which layouts there are, before anything is written."""
    with pytest.raises(UserError, match="dataset.layout=voc: no such layout; choose one of open_images, folder"):
        command({"name": "mine", "layout": "voc", "dir": "mine"}, "tiny", str(tmp_path / "work"))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("command", [preparation.prepare, preparation.ensure])
def test_datasets_without_a_manifest_are_read_as_they_are(command, tmp_path, monkeypatch):
    """Guards pictures and edits: the folder, the list of edits, or its renders where a count asks for them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    work, renders = str(tmp_path / "work"), []
    pictures = {"name": "pictures", "layout": "pictures", "dir": "mine"}
    edits = {"name": "editing", "layout": "editing", "dir": "datasets/editing", "count": None}
    monkeypatch.setattr(editing, "generate", lambda root, count: (renders.append((root, count)), root)[1])
    assert command(pictures, "tiny", work) == tmp_path / "mine"
    assert command(edits, "tiny", work) == ROOT / "datasets" / "editing" / "edits.jsonl"
    assert not renders and not (tmp_path / "work").exists(), "nothing is rendered, nothing written"
    folder = tmp_path / "work" / "editing" / "renders-3"
    assert command(edits | {"count": 3}, "tiny", work) == folder / "edits.jsonl" and renders == [(folder, 3)]
    with pytest.raises(UserError, match="dataset.dir=nowhere: no such folder"):
        command(pictures | {"dir": "nowhere"}, "tiny", work)


def test_a_refused_preparation_leaves_no_folder(tmp_path):
    """Guards ``work/``: a dataset that is refused under the lock leaves no folder; one that was there stays."""
    work = tmp_path / "new" / "work"
    for exists in (False, True):
        if exists:
            (work / "mine").mkdir(parents=True)
        with pytest.raises(UserError, match="refused"), preparation.lock(work / "mine"):
            raise UserError("refused")
        assert (work / "mine").exists() == exists and work.parent.exists() == exists


def test_the_process_that_prepares_is_as_quiet(tmp_path, capfd):
    """Guards the first run of a clone: preparation has a process of its own, whose libraries are quiet too."""
    rng, folder, mask = np.random.default_rng(0), tmp_path / "mine", np.zeros((48, 48), bool)
    mask[10:30, 10:30] = True
    for i in range(4):
        write_image(folder / "images" / f"{i}.png", rng.integers(0, 256, (48, 48, 3)).astype(np.uint8))
        write_image(folder / "masks" / f"{i}.png", mask)
    cfg = compose("fit", ["experiment=color", "dataset=folder", f"dataset.dir={folder}"])
    recipe = OmegaConf.to_container(cfg.dataset, resolve=True)
    assert preparation.ensure(recipe, "tiny", str(tmp_path / "work")).exists()
    out, err = capfd.readouterr()
    assert "kept" in out, "it does say what it does"
    assert not re.search("GPU available|Tip:|deprecated", out + err), out + err
