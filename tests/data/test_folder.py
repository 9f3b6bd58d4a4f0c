"""A user's folder of photographs and masks: what lies in it is used, or counted and named."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from harmony.core.row import SPLITS
from harmony.data.sources.folder import draw_split, draw_splits, read_captions, select_folder
from harmony.data.sources.selection import KEPT, Rules
from harmony.pixels.images import FORMATS, SUFFIXES, list_formats, write_image

MASK = np.zeros((32, 40), bool)
MASK[8:24, 10:30] = True


def add(folder, image, mask=None, level=90):
    """Write one photograph, and its mask if it has one; any suffix in any case."""
    for path, pixels in ((folder / "images" / image, np.full((32, 40, 3), level, np.uint8)), (mask, MASK)):
        if path is not None:
            path = folder / "masks" / path if isinstance(path, str) else path
            write_image(path.with_suffix(path.suffix.lower()), pixels)
            os.rename(path.with_suffix(path.suffix.lower()), path)


def reasons(root, splits=SPLITS):
    return dict(select_folder(root, splits, Rules()).table.select("id", "reason").iter_rows())


def test_files_of_any_suffix_are_used(tmp_path):
    for image, mask in {"a.JPG": "a.png", "b.png": "b.PNG", "c.jpeg": "c.jpg", "d.v2.jpg": "d.v2.png"}.items():
        add(tmp_path, image, mask)
    table = select_folder(tmp_path, SPLITS, Rules()).table
    assert set(table["reason"]) == {KEPT} and set(table["id"]) == {"a", "b", "c", "d.v2"}
    assert set(table["mask"]) == {"masks/a.png", "masks/b.PNG", "masks/c.jpg", "masks/d.v2.png"}
    assert set(table["x0"]) == {0.25}


def test_every_format_that_is_read_is_looked_for(tmp_path):
    """Guards photographs that would vanish: each suffix of a format that the reader takes."""
    assert {Image.registered_extensions()[suffix] for suffix in SUFFIXES} == {*list_formats()} == {*FORMATS, "HEIF"}
    for suffix in SUFFIXES:
        add(tmp_path, f"{suffix[1:]}.png", f"{suffix[1:]}.png")
        path = tmp_path / "images" / f"{suffix[1:]}.png"
        Image.open(path).save(path.with_suffix(suffix))
        if suffix != ".png":
            path.unlink()
    assert reasons(tmp_path) == {suffix[1:]: KEPT for suffix in SUFFIXES}


def test_two_images_of_one_name_are_counted_and_one_is_kept(tmp_path):
    add(tmp_path, "a.jpg", "a.png")
    add(tmp_path, "a.png", level=200)
    table = select_folder(tmp_path, SPLITS, Rules()).table
    assert sorted(table.select("id", "reason", "image").rows()) == [
        ("a", KEPT, "images/a.jpg"),
        ("a.png", "two images of one name", "images/a.png"),
    ]


def test_what_belongs_to_nothing_is_named(tmp_path, capsys):
    add(tmp_path, "a.jpg", "a.png")
    add(tmp_path, "b.jpg", "b.png")
    add(tmp_path, "b.jpg", "b.jpg")
    add(tmp_path, "c.jpg", "other.png")
    (tmp_path / "images" / "more").mkdir()
    (tmp_path / "images" / "d.jxl").write_bytes(b"x")
    (tmp_path / "images" / ".DS_Store").write_bytes(b"x")
    add(tmp_path / "extra", "e.jpg", "e.png")
    assert reasons(tmp_path) == {"a": KEPT, "b": KEPT, "c": "mask file missing"}
    out = capsys.readouterr().out
    assert "folders with images beside those of the dataset: 1 left out: extra\n" in out
    assert ".heif): 2 left out: d.jxl, more\n" in out
    assert "masks of no image: 1 left out: other.png\n" in out
    assert "further masks of one name: 1 left out: b.jpg\n" in out and ".DS_Store" not in out


def test_a_name_that_no_table_can_hold_is_counted(tmp_path):
    add(tmp_path, "a.jpg", "a.png")
    os.rename(os.fsencode(tmp_path / "images" / "a.jpg"), os.fsencode(tmp_path / "images") + b"/caf\xe9.jpg")
    add(tmp_path, "x" * 200 + ".jpg", "a.png")
    assert set(reasons(tmp_path).values()) == {"no file name"}


def test_areas_are_checked_before_splits_are_drawn(tmp_path):
    add(tmp_path, "a.jpg", "a.png")
    table = select_folder(tmp_path, SPLITS, Rules(min_area=0.3)).table
    assert table["reason"].to_list() == ["mask area too small"]
    assert set(select_folder(tmp_path, SPLITS, Rules(max_area=0.2)).table["reason"]) == {"mask area too large"}


@pytest.mark.parametrize("other", ["val", "valid", "dev"])
def test_other_names_of_the_validation_split_are_read(tmp_path, other, capsys):
    add(tmp_path / "train", "t.jpg", "t.png")
    add(tmp_path / other, "v.jpg", "v.png")
    (tmp_path / other / "captions.json").write_text(json.dumps({"v.jpg": "mine"}))
    table = select_folder(tmp_path, SPLITS, Rules()).table
    assert table.select("split", "id", "image").rows() == [
        ("train", "t", "train/images/t.jpg"),
        ("validation", "v", f"{other}/images/v.jpg"),
    ]
    assert read_captions(tmp_path, SPLITS) == {"validation/v": ["mine"]}
    add(tmp_path / "validation", "w.jpg", "w.png")
    assert set(reasons(tmp_path)) == {"t", "w"}
    assert f"beside those of the dataset: 1 left out: {other}\n" in capsys.readouterr().out


def test_captions_by_name_or_file_and_for_all_splits(tmp_path, capsys):
    for split, name in (("train", "a"), ("train", "b"), ("test", "c")):
        add(tmp_path / split, f"{name}.jpg", f"{name}.png")
    (tmp_path / "captions.json").write_bytes(b'\xef\xbb\xbf{"a": "A", "b": "B", "c": "C", "z.jpg": "Z"}\r\n')
    (tmp_path / "train" / "captions.json").write_text(json.dumps({"b.jpg": "B2", "c": "no"}))
    assert read_captions(tmp_path, SPLITS) == {"train/a": ["A"], "train/b": ["B2"], "test/c": ["C"]}
    out = capsys.readouterr().out
    assert "1 left out: z.jpg\n" in out and "1 left out: c\n" in out


def test_three_images_fill_three_splits_whatever_their_names():
    for n in range(50):
        names = [f"{n}-{i}" for i in range(3)]
        assert sorted(draw_splits(names).values()) == sorted(SPLITS)
    for count in (1, 2):
        assert all(split == draw_split(name) for name, split in draw_splits(names[:count]).items())
    many = [f"{i}" for i in range(200)]
    assert draw_splits(many) == {name: draw_split(name) for name in many}, "nothing moves where no split is empty"


def test_images_that_are_left_out_fill_no_split(tmp_path):
    for name in ("a", "b", "c"):
        add(tmp_path, f"{name}.jpg", f"{name}.png")
    for name in ("d", "e", "f", "g", "h", "i"):
        add(tmp_path, f"{name}.jpg")
    table = select_folder(tmp_path, SPLITS, Rules()).table
    assert sorted(table.filter(table["reason"] == KEPT)["split"]) == sorted(SPLITS)
