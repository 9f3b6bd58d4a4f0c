"""Selection: one reason an image, exact counts on real photographs, damaged files."""

import json

import numpy as np
import polars as pl
import pytest

from harmony.core.errors import UserError
from harmony.data.sources.open_images.database import selection_rows
from harmony.data.sources.open_images.layout import Split
from harmony.data.sources.open_images.pixel_facts import pixel_facts
from harmony.data.sources.open_images.select import select
from harmony.data.sources.pixels import read_rows
from harmony.data.sources.selection import (
    ANNOTATION_REASONS,
    KEPT,
    Rules,
    format_counts,
    read_ids,
    read_splits,
    reject,
    write_selection,
)
from harmony.pixels.images import read_image, write_image


def reasons(root, rules=None, split="train"):
    table = select(root, [split], rules or Rules()).table
    return dict(table.select("id", "reason").iter_rows())


REAL = [("train", 876, 645), ("validation", 101, 75), ("test", 170, 137)]


@pytest.mark.parametrize(("split", "images", "single"), REAL)
def test_real_photographs_with_one_instance_and_one_mask(shared_data, split, images, single):
    selection = select(shared_data / "openimages-mini", [split], Rules())
    counts = selection.counts()[split]
    assert sum(counts.values()) == images == selection.table["id"].n_unique()
    assert images - sum(counts.get(reason, 0) for reason in ANNOTATION_REASONS) == single
    assert selection.damage_counts == {}


def test_every_image_gets_the_first_reason_that_applies(tmp_path, make_folder):
    folder = make_folder(tmp_path)
    folder.single("a0")
    for id_, flags in {"a1": "truncated", "a2": "group", "a3": "depiction", "a4": "inside"}.items():
        folder.single(id_, **{flags: 1})
    folder.single("a5", group=-1)  # not known
    folder.single("a6", box=(0.0, 0.1, 0.0, 0.1))
    folder.single("a7", box=(0.0, 1.0, 0.0, 1.0))
    folder.single("b0", group=1)
    folder.box("b0", label="/m/dog")
    folder.image("b1")
    folder.box("b1")
    folder.single("b2")
    folder.mask("b2")
    folder.image("b3")
    folder.mask("b3")
    folder.single("b4", label="/m/dog")
    assert reasons(folder.write()) == {
        "a0": KEPT,
        "a1": "truncated",
        "a2": "group",
        "a3": "depiction",
        "a4": "inside view",
        "a5": KEPT,
        "a6": "too small",
        "a7": "too large",
        "b0": "several instances",
        "b1": "box without mask",
        "b2": "several masks",
        "b3": "mask without box",
        "b4": "mask of another class",
    }


def test_area_limits_include_their_ends(tmp_path, make_folder):
    folder = make_folder(tmp_path)
    for id_, side in {"a0": 0.125, "a1": 0.5, "a2": 0.875}.items():
        folder.single(id_, box=(0, side, 0, side))
    root = folder.write()
    assert set(reasons(root, Rules(min_area=0.125**2, max_area=0.875**2)).values()) == {KEPT}
    outside = reasons(root, Rules(min_area=0.126**2, max_area=0.874**2))
    assert outside == {"a0": "too small", "a1": KEPT, "a2": "too large"}


def test_each_allowance_lets_its_images_in(tmp_path, make_folder):
    folder = make_folder(tmp_path)
    for name in ("group", "depiction", "truncated", "inside"):
        folder.single(name, **{name: 1})
    root = folder.write()
    for name in ("group", "depiction", "truncated", "inside"):
        found = reasons(root, Rules(**{f"allow_{name}": True}))
        assert [id_ for id_, reason in found.items() if reason == KEPT] == [name]


def test_lists_of_classes_sources_and_ids(tmp_path, make_folder):
    folder = make_folder(tmp_path)
    folder.single("a0")
    folder.single("a1")
    folder.sources[-1][1] = "voc2007"
    root = folder.write()
    assert reasons(root, Rules(classes=["cat"])) == {"a0": KEPT, "a1": KEPT}
    assert reasons(root, Rules(classes=["/m/dog"])) == dict.fromkeys(("a0", "a1"), "class not wanted")
    assert reasons(root, Rules(sources=["ccp"])) == {"a0": KEPT, "a1": "source not wanted"}
    assert reasons(root, Rules(image_ids=["train/a1"])) == {"a0": "id not listed", "a1": KEPT}
    assert reasons(root, Rules(max_samples=1)) == {"a0": KEPT, "a1": "over max_samples"}
    (tmp_path / "ids.txt").write_text("train/a0\na7\n")
    assert read_ids(Rules(image_ids=str(tmp_path / "ids.txt"))) == {"a0", "a7"}
    with pytest.raises(UserError, match="no class zebra"):
        reasons(root, Rules(classes=["zebra"]))


def test_tables_by_a_spreadsheet_mean_the_same(tmp_path, make_folder):
    """Guards all CSVs: byte order mark, CRLF, and every field in quotes, also where the last line is cut."""
    folder = make_folder(tmp_path)
    folder.single("a0")
    folder.single("a1")
    root = folder.write()
    (root / "train/metadata/image_ids.csv").write_text("ImageID,Subset\na0,train\na9,train\n")
    rules = Rules(classes=["Cat"], sources=["ccp"])
    plain = select(root, ["train"], rules).table
    assert plain["label"].to_list() == ["Cat", "Cat", None]
    for path in root.glob("train/*/*.csv"):
        lines = path.read_text().splitlines()
        quoted = "\r\n".join(",".join(f'"{field}"' for field in line.split(",")) for line in lines)
        path.write_bytes(b"\xef\xbb\xbf" + quoted.encode() + b"\r\n")
    assert select(root, ["train"], rules).table.equals(plain)
    path = root / "train/labels/detections.csv"
    path.write_bytes(path.read_bytes()[:-6])
    assert select(root, ["train"], rules).damage_counts == {"train/labels/detections.csv": 1}


def test_names_of_classes_may_be_quoted_and_hold_commas(tmp_path):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "classes.csv").write_bytes(b'\xef\xbb\xbf/m/1,"Car, big"\r\n/m/2,Cat, small\r\n/m/3\r\n')
    assert Split(tmp_path).class_names() == {"/m/1": "Car, big", "/m/2": "Cat, small"}


def test_an_empty_table_is_named(tmp_path, make_folder):
    folder = make_folder(tmp_path)
    folder.single("a0")
    root = folder.write()
    (root / "train/metadata/image_ids.csv").write_text("")
    with pytest.raises(UserError, match="image_ids.csv: its first line is empty"):
        reasons(root)


def test_one_name_stands_for_a_list_and_ids_of_digits_are_text(tmp_path, make_folder):
    folder = make_folder(tmp_path)
    folder.single("1234567890123456")
    folder.single("0012")
    root = folder.write()
    assert set(reasons(root, Rules.of({"classes": "Cat", "sources": "ccp"})).values()) == {KEPT}
    for ids in ([1234567890123456, "a"], 1234567890123456):
        assert reasons(root, Rules.of({"image_ids": ids})) == {"1234567890123456": KEPT, "0012": "id not listed"}
    assert reasons(root, Rules.of({"image_ids": ["0012"]}))["0012"] == KEPT
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbftrain/0012\r\n")
    assert read_ids(Rules.of({"image_ids": str(tmp_path / "ids.txt")})) == {"0012"}
    with pytest.raises(UserError, match=r"dataset.select.image_ids: 1e\+18 is no name; put .* into quotes"):
        Rules.of({"image_ids": [1e18]})


def test_ids_and_masks_that_are_paths_are_counted(tmp_path, make_folder):
    """Guards foreign tables: ``ImageID = ../../../x`` wrote outside the work folder."""
    folder = make_folder(tmp_path / "data")
    folder.single("a0")
    folder.single("b0")
    folder.box("../../x")
    folder.masks.append(["a0_0.png", "../../x", *folder.masks[0][2:]])
    folder.masks[1][0] = "../../A/a0_0.png"
    root = folder.write()
    (root / "x.jpg").write_bytes((root / "train/data/a0.jpg").read_bytes())
    selection = select(root, ["train"], Rules())
    assert dict(selection.table.select("id", "reason").iter_rows()) == {
        "../../x": "no file name",
        "a0": KEPT,
        "b0": "no file name",
    }
    assert [row["id"] for row in selection_rows(selection)] == ["a0"]
    write_image(tmp_path / "mask.png", np.tri(64, 80, dtype=bool))  # of another size, so that it is written
    sample = {"key": "train/../../../x", "image": str(root / "x.jpg"), "mask": str(tmp_path / "mask.png")}
    with pytest.raises(UserError, match="leads out of"):
        pixel_facts(sample, Rules(), tmp_path / "work")


def test_photographs_may_have_another_suffix_and_splits_another_name(tmp_path, make_folder, capsys):
    for split in ("train", "val"):
        folder = make_folder(tmp_path, split)
        for id_ in ("a0", "a1", "a2"):
            folder.single(id_)
        folder.write()
    data = tmp_path / "train/data"
    write_image(data / "a0.png", read_image(data / "a0.jpg"))
    (data / "a0.jpg").unlink()
    (data / "a1.jpg").rename(data / "a1.JPEG")
    write_image(data / "a2.png", read_image(data / "a2.jpg"))
    table = select(tmp_path, ["train", "validation"], Rules()).table
    assert set(table["reason"]) == {KEPT} and set(table["split"]) == {"train", "validation"}
    images = ["train/data/a0.png", "train/data/a1.JPEG", "train/data/a2.jpg"]
    assert table["image"].to_list() == images + [f"val/data/a{i}.jpg" for i in range(3)]
    assert "further files of one id: 1 left out: a2.png\n" in capsys.readouterr().out
    assert [row.image for row in read_rows(tmp_path / "train", "train", tmp_path)] == images


def test_splits_are_read_from_one_name_or_several():
    assert read_splits("train") == ["train"] and read_splits(["test", "train", "test"]) == ["test", "train"]
    for splits in (["dev"], [], None):
        with pytest.raises(UserError, match="choose among train, validation, test"):
            read_splits(splits)


def test_an_image_without_any_annotation_is_listed(tmp_path, make_folder):
    folder = make_folder(tmp_path)
    folder.single("a0")
    root = folder.write()
    (root / "train/metadata/image_ids.csv").write_text("ImageID,Subset\na0,train\na9,train\n")
    assert reasons(root) == {"a0": KEPT, "a9": "no instance"}


def test_files_that_are_not_there(tmp_path, make_folder):
    folder = make_folder(tmp_path)
    for id_ in ("a0", "a1", "a2"):
        folder.single(id_)
    root = folder.write()
    (root / "train/data/a1.jpg").unlink()
    (root / "train/labels/masks/A" / folder.masks[2][0]).unlink()
    assert reasons(root) == {"a0": KEPT, "a1": "image file missing", "a2": "mask file missing"}


@pytest.mark.parametrize("name", ["detections.csv", "segmentations.csv"])
def test_a_missing_column_is_named_with_the_file_and_the_header(tmp_path, make_folder, name):
    folder = make_folder(tmp_path)
    folder.single("a0")
    path = folder.write() / "train/labels" / name
    path.write_text(path.read_text().replace("LabelName", "Label"))
    with pytest.raises(UserError, match=f"{name}: column LabelName missing; the expected header is .*LabelName"):
        reasons(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: file missing"):
        reasons(tmp_path)


@pytest.mark.parametrize("cut", [3, 14, 30, 45])
@pytest.mark.parametrize("name", ["detections.csv", "segmentations.csv"])
def test_a_cut_last_line_is_counted_and_its_image_not_trusted(tmp_path, make_folder, name, cut):
    folder = make_folder(tmp_path)
    for id_ in ("a0000001", "a0000002"):
        folder.single(id_)
    folder.box("a0000002")  # a second box: cut away, it must not turn its image into a single instance
    path = folder.write() / "train/labels" / name
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:cut])
    selection = select(tmp_path, ["train"], Rules())
    assert selection.damage_counts == {f"train/labels/{name}": 1}
    found = dict(selection.table.select("id", "reason").iter_rows())
    assert found["a0000001"] == KEPT
    if cut > 12:
        assert found["a0000002"] in ("damaged row", "several instances")


def test_a_value_that_is_no_number_is_damage_too(tmp_path, make_folder):
    folder = make_folder(tmp_path)
    folder.single("a0")
    folder.single("a1", box=(0.1, "x", 0.1, 0.5))
    assert reasons(folder.write()) == {"a0": KEPT, "a1": "damaged row"}


def test_selection_is_written_with_its_counts(tmp_path, make_folder):
    folder = make_folder(tmp_path / "data")
    folder.single("a0")
    folder.single("a1", group=1)
    selection = select(folder.write(), ["train"], Rules())
    changed = reject(selection.table, {"train/a0": "mask empty", "test/a1": "mask empty"})
    table, summary = write_selection(selection, tmp_path / "work", changed)
    assert dict(pl.read_csv(table).select("id", "reason").iter_rows()) == {"a0": "mask empty", "a1": "group"}
    assert json.loads(summary.read_text())["counts"] == {"train": {"group": 1, "mask empty": 1}}
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["selection.csv", "selection.json"]
    assert "group" in format_counts(selection.counts()) and "mask empty" not in format_counts(selection.counts())


def test_digest_follows_rules_and_decisions(tmp_path, make_folder):
    folder = make_folder(tmp_path)
    folder.single("a0")
    root = folder.write()
    first = select(root, ["train"], Rules())
    assert first.digest() == select(root, ["train"], Rules()).digest()
    assert first.digest() != select(root, ["train"], Rules(min_area=0.03)).digest()
    folder.single("a1")
    folder.write()
    assert first.digest() != select(root, ["train"], Rules()).digest()


def test_wrong_thresholds_and_splits_are_refused(tmp_path):
    with pytest.raises(UserError, match="min_area"):
        Rules(min_area=0.9, max_area=0.8)
    with pytest.raises(UserError, match="max_samples"):
        Rules(max_samples=0)
    with pytest.raises(UserError, match="no such split"):
        select(tmp_path, ["train"], Rules())


@pytest.mark.parametrize("name", ["labels/segmentations.csv", "metadata/image_ids.csv"])
def test_two_columns_of_one_name_are_one_line(name, tmp_path, make_folder):
    """Found by a fuzzer: names that are equal without their quotes."""
    folder = make_folder(tmp_path)
    folder.single("a0")
    root = folder.write()
    path = root / "train" / name
    header = "ImageID,Subset" if not path.exists() else path.read_text().splitlines()[0]
    path.write_text(f'{header},"x",x\na0,train,1,1\n')
    with pytest.raises(UserError, match="two columns of its first line have one name"):
        select(root, ["train"], Rules())


def test_a_class_name_has_one_line(tmp_path, make_folder):
    """Found by a fuzzer: a quoted name with a line break."""
    folder = make_folder(tmp_path)
    folder.single("a0")
    root = folder.write()
    (root / "train" / "metadata" / "classes.csv").write_text('/m/cat,"Cat,\n  small"\n')
    assert Split(root / "train").class_names() == {"/m/cat": "Cat, small"}
