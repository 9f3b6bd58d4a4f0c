"""Rows of a folder in Open Images layout, the largest instance of each photograph: what a backbone is trained on."""

import shutil
from pathlib import Path

import pytest

from harmony.core.errors import UserError
from harmony.data.manifest import read_manifest
from harmony.data.pixel_data import is_render
from harmony.data.sources import pixels
from harmony.data.sources.pixels import prepare_backbone, read_rows

ROOT = Path(__file__).resolve().parents[2]


def test_rows_take_the_largest_instance_and_leave_out_what_is_broken(photos, tmp_path, capsys):
    """Guards the gathering: largest box within 2 % .. 80 %, undecodable pictures left out, boxes from the mask."""
    rows = read_rows(photos / "train", "train", tmp_path)
    assert [row.id for row in rows] == ["a1", "a2"], "a1's 81 % box and a3's 1 % box are out of range, a4 is no picture"
    assert "train: pictures that cannot be decoded, or their masks: 1 left out: a4\n" in capsys.readouterr().out
    assert rows[0].mask.endswith("a1_0.png") and rows[0].box == (6.0, 4.0, 30.0, 20.0)
    assert rows[0].caption == "a photo of a cat" and (rows[0].width, rows[0].height) == (60, 40)
    assert all((tmp_path / row.image).exists() and (tmp_path / row.mask).exists() for row in rows)
    assert [row.id for row in read_rows(photos / "train", "train", tmp_path, ["ccp"])] == ["a1"]


def test_a_relit_picture_without_a_caption_of_its_own_gives_no_row(photos, tmp_path):
    shutil.copytree(photos / "train", tmp_path / "train")
    (tmp_path / "train" / "relit").mkdir()
    shutil.copy(tmp_path / "train" / "data" / "a1.jpg", tmp_path / "train" / "relit" / "a1.jpg")
    assert [row.id for row in read_rows(tmp_path / "train", "train", tmp_path)] == ["a1", "a2"]


def test_photographs_of_unknown_source_may_not_train(photos, tmp_path):
    """Guards licenses: where nothing says which source a photograph has, none passes as permitted."""
    shutil.copytree(photos / "train", tmp_path / "train")
    (tmp_path / "train" / "metadata" / "sources.csv").unlink()
    with pytest.raises(UserError, match="no metadata/sources.csv"):
        read_rows(tmp_path / "train", "train", tmp_path, ["ccp"])


def test_a_studio_scene_gives_two_rows(studio_rows):
    """Guards the captions of relit pictures: the row of light B shows the relit file and names light B."""
    rows = read_rows(ROOT / "datasets" / "studio" / "validation", "validation", ROOT)
    lit = {row.id: row for row in rows}
    assert len(rows) == 128 and all(is_render(row) for row in rows)
    for row in rows[:20:2]:
        other = lit[f"{row.id}b"]
        assert "/data/" in row.image and "/relit/" in other.image and row.mask == other.mask
        assert row.caption.split(",")[0] == other.caption.split(",")[0] and row.caption != other.caption


def test_backbone_manifest_joins_renders_and_permitted_photographs(photos, tmp_path, monkeypatch):
    """Guards what shipped weights see: only photographs of the listed sources train; the test split may hold any."""
    small = tmp_path / "studio_small"
    source = ROOT / "datasets" / "studio" / "validation"
    for split in ("train", "validation", "test"):
        shutil.copytree(source / "labels", small / split / "labels")
        shutil.copytree(source / "metadata", small / split / "metadata")
        (small / split / "data").mkdir()
        for path in sorted((source / "data").iterdir())[:2]:
            shutil.copy(path, small / split / "data")
    monkeypatch.setattr(pixels, "generate", lambda root, *args, **options: root)
    recipe = {"name": "backbone", "dir": str(small), "count": 0, "size": 16, "photos": str(photos), "sources": ["ccp"]}
    rows = read_manifest(prepare_backbone(recipe, tmp_path / "work"))[1]
    photographs = {split: [r.id for r in rows if r.split == split and r.id.startswith("a") and len(r.id) == 2] for split
    in
                   ("train", "validation", "test")}  # fmt: skip
    assert photographs == {"train": ["a1"], "validation": ["a1"], "test": ["a1", "a2"]}
    assert len(rows) == 3 * 2 + 4

    def generate(root: Path, count: int, size: int, start: int = 0, splits: tuple = (), plate: bool = True) -> Path:
        assert (count, size, start, splits) == (7, 16, 0, ("train", "validation", "test"))
        return shutil.copytree(small, root)

    monkeypatch.setattr(
        pixels, "generate", generate
    )  # without the bundled set, whose pictures are too small, all splits
    rows = read_manifest(prepare_backbone(recipe | {"dir": None, "count": 7}, tmp_path / "own"))[1]
    assert len(rows) == 3 * 2 + 4 and sum(row.image.startswith("studio/") for row in rows) == 6


def test_missing_photographs_are_said_before_scenes_are_rendered(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "generate", lambda *given, **more: pytest.fail("rendered"))
    recipe = {"name": "b", "dir": str(tmp_path), "count": 6400, "size": 64, "photos": "nowhere", "sources": []}
    with pytest.raises(UserError, match="dataset.photos=nowhere: no such folder"):
        prepare_backbone(recipe, tmp_path / "work")
