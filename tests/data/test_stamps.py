"""A prepared dataset is prepared again when its files, its recipe or the meaning of its path change, else never."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from harmony.core.errors import UserError
from harmony.data import preparation, stamps
from harmony.data.sources import folder as folder_source
from harmony.pixels.images import write_image


@pytest.fixture
def root(tmp_path):
    """Photographs with masks, and captions."""
    for name in ("a", "b"):
        for part in ("images", "masks"):
            write_image(tmp_path / "mine" / part / f"{name}.png", np.full((4, 4), ord(name), np.uint8))
    (tmp_path / "mine" / "captions.json").write_text("{}")
    return tmp_path / "mine"


CHANGES = {
    "a replaced photograph": lambda root: shutil.copy(root / "images/b.png", root / "images/a.png"),
    "a painted mask": lambda root: os.utime(root / "masks/a.png", ns=(1, 1)),
    "a new pair": lambda root: shutil.copy(root / "images/b.png", root / "images/c.png"),
    "a lost mask": lambda root: (root / "masks/a.png").unlink(),
    "a new name": lambda root: (root / "masks/a.png").rename(root / "masks/d.png"),
    "captions": lambda root: (root / "captions.json").write_text('{"a": "x"}'),
    "a new split": lambda root: write_image(root / "val/images/v.png", np.zeros((4, 4), np.uint8)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_file_is_noticed(root, tmp_path, change):
    places = folder_source.list_places(root, ["train"])
    assert stamps.has_changed(tmp_path)
    stamps.write_stamps(tmp_path, places)
    assert not stamps.has_changed(tmp_path)
    CHANGES[change](root)
    assert stamps.has_changed(tmp_path)
    stamps.write_stamps(tmp_path, places)
    assert not stamps.has_changed(tmp_path)


def test_other_files_are_no_change_and_links_in_a_circle_end(root, tmp_path):
    os.symlink(root / "images", root / "images" / "circle")
    os.symlink(root / "gone", root / "images" / "broken.png")
    os.rename(os.fsencode(root / "masks/b.png"), os.fsencode(root) + b"/masks/\xe9.png")
    stamps.write_stamps(tmp_path, folder_source.list_places(root, ["train"]))
    (root / "images" / ".DS_Store").write_text("x")
    (root / "notes.txt").write_text("x")
    assert not stamps.has_changed(tmp_path)
    for content in ("", "[1]", "{}", "["):
        (tmp_path / "stamps.json").write_text(content)
        assert stamps.has_changed(tmp_path)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The folders that were prepared; ``prepare`` leaves what the real one does, in this process."""
    calls = []

    class Here:
        def __init__(self, *args, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, recipe, backbone, work):
            calls.append(recipe["dir"])
            folder = tmp_path / "work" / recipe["name"]
            (folder / "manifest.jsonl").write_text("{}\n")
            stamps.write_stamps(folder, folder_source.list_places(Path(recipe["dir"]), ["train"]))
            (folder / "recipe.json").write_text(json.dumps(recipe))
            return type("Future", (), {"result": lambda self: folder / "manifest.jsonl"})()

    monkeypatch.setattr(preparation, "ProcessPoolExecutor", Here)
    return calls


def test_fit_and_evaluate_prepare_again_what_has_changed(root, tmp_path, asked, monkeypatch, capsys):
    recipe = {"name": "mine", "layout": "folder", "dir": "mine"}
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        preparation.ensure(recipe, "tiny", str(tmp_path / "work"))
    assert asked == [str(root)] and "changed" not in capsys.readouterr().out
    CHANGES["a new pair"](root)
    for _ in range(2):
        preparation.ensure(recipe, "tiny", str(tmp_path / "work"))
    assert asked == [str(root)] * 2
    assert capsys.readouterr().out == "mine: files have changed since it was prepared, preparing it again\n"
    (tmp_path / "work" / "mine" / "recipe.json").write_text("[" * 100_000)
    preparation.ensure(recipe, "tiny", str(tmp_path / "work"))
    assert len(asked) == 3, "a damaged record counts as none"


def test_a_relative_folder_is_another_one_elsewhere(root, tmp_path, asked, monkeypatch):
    recipe = {"name": "mine", "layout": "folder", "dir": "mine"}
    shutil.copytree(root, tmp_path / "elsewhere" / "mine")
    for place in (tmp_path, tmp_path / "elsewhere", tmp_path / "elsewhere"):
        monkeypatch.chdir(place)
        preparation.ensure(recipe, "tiny", str(tmp_path / "work"))
    assert asked == [str(root), str(tmp_path / "elsewhere" / "mine")]


@pytest.mark.parametrize("name", ["../mine", "/etc/mine", ""])
def test_a_dataset_stays_in_the_work_folder(root, tmp_path, name):
    recipe = {"name": name, "layout": "folder", "dir": str(root)}
    for command in (preparation.prepare, preparation.ensure):
        with pytest.raises(UserError, match="leads out of"):
            command(recipe, "tiny", str(tmp_path / "work"))
    assert not (tmp_path / "work").exists()
