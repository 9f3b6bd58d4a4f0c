"""Pairs in the layouts that people have: before and after, and iHarmony4's; what is wrong is counted and named."""

import os

import numpy as np
import pytest
from PIL import Image

from harmony.core.errors import UserError
from harmony.core.row import SPLITS, Row
from harmony.data.manifest import read_manifest
from harmony.data.preparation import prepare
from harmony.data.sources.open_images.rows import write_index
from harmony.data.sources.pairs import read_captions, read_lists, select_pairs
from harmony.data.sources.selection import KEPT, Rules
from harmony.methods.inputs import list_composites
from harmony.pixels.composites import change_light, copy_paste
from harmony.pixels.images import read_image, write_image
from harmony.pixels.masks import read_mask

MASK = np.zeros((48, 64), bool)
MASK[12:36, 16:40] = True


def photograph(seed: int, shape: tuple[int, int] = (48, 64)) -> np.ndarray:
    """A smooth picture, so that JPEG keeps it."""
    small = np.random.default_rng(seed).integers(60, 200, (3, 4, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize(shape[::-1], Image.BICUBIC))


def compose(truth: np.ndarray, seed: int) -> np.ndarray:
    """The photograph with its object under another light."""
    return copy_paste(truth, change_light(truth, np.random.default_rng(seed)), MASK)


def add_before(root, name, seed=0, mask=True):
    """A user's pair."""
    write_image(root / "before" / f"{name}.jpg", compose(photograph(seed), seed), quality=95)
    write_image(root / "after" / f"{name}.png", photograph(seed))
    if mask:
        write_image(root / "masks" / f"{name}.png", MASK)


def add_five(root, name, seed=0, count=5):
    """Composites of one photograph and mask, as in iHarmony4."""
    write_image(root / "real_images" / f"{name}.jpg", photograph(seed), quality=95)
    write_image(root / "masks" / f"{name}_7.png", MASK)
    for n in range(1, count + 1):
        write_image(root / "composite_images" / f"{name}_7_{n}.jpg", compose(photograph(seed), n), quality=95)


def select(root, work, splits=SPLITS, **rules):
    return select_pairs(root, splits, Rules(**rules), work).table


def reasons(root, work):
    return dict(select(root, work).select("id", "reason").iter_rows())


def test_before_and_after_with_masks(tmp_path):
    for seed, name in enumerate("abc"):
        add_before(tmp_path, name, seed)
    table = select(tmp_path, tmp_path / "work")
    assert set(table["reason"]) == {KEPT} and sorted(table["split"]) == sorted(SPLITS)
    row = table.filter(table["id"] == "a").row(0, named=True)
    assert (row["image"], row["composite"], row["mask"]) == ("after/a.png", "before/a.jpg", "masks/a.png")
    assert (row["x0"], row["y0"], row["x1"], row["y1"]) == (0.25, 0.25, 0.625, 0.75)


def test_without_masks_the_difference_is_the_mask(tmp_path):
    """Guards masks that nobody drew: nearly the object, without JPEG's errors; pictures that are the same have none."""
    for seed, name in enumerate("abc"):
        add_before(tmp_path, name, seed + 3, mask=False)
    write_image(tmp_path / "before" / "same.jpg", photograph(9), quality=80)
    write_image(tmp_path / "after" / "same.png", photograph(9))
    table, work = select(tmp_path, tmp_path / "work"), tmp_path / "work" / "changes"
    assert dict(table.select("id", "reason").iter_rows()) == {"a": KEPT, "b": KEPT, "c": KEPT, "same": "mask empty"}
    for name in "abc":
        mask = read_mask(next(work.glob(f"{name}-*.png")), (64, 48))
        assert (mask & MASK).sum() / (mask | MASK).sum() > 0.7
    assert table["mask"][0].startswith(f"work/changes/{table['id'][0]}-")
    times = {path: path.stat().st_mtime_ns for path in work.iterdir()}
    select(tmp_path, tmp_path / "work")
    assert {path: path.stat().st_mtime_ns for path in work.iterdir()} == times, "nothing is written again"


def test_five_composites_of_one_photograph_stay_in_one_split(tmp_path):
    """Guards the protocol: names of masks and photographs begin as the composite's, and a photograph has one split."""
    for seed in range(12):
        add_five(tmp_path / "HCOCO", f"c{seed}", seed)
    add_five(tmp_path / "Hday2night", "d90-11", 20, count=2)
    table = select(tmp_path, tmp_path / "work")
    assert len(table) == 62 and set(table["reason"]) == {KEPT} and set(table["split"]) == {*SPLITS}
    for image in table["image"].unique():
        assert table.filter(table["image"] == image)["split"].n_unique() == 1
    row = table.filter(table["id"] == "d90-11_7_2").row(0, named=True)
    assert row["image"] == "Hday2night/real_images/d90-11.jpg" and row["mask"] == "Hday2night/masks/d90-11_7.png"
    assert row["composite"] == "Hday2night/composite_images/d90-11_7_2.jpg"


def test_lists_set_the_splits(tmp_path):
    """Guards iHarmony4's own test set; a tenth of the training photographs validates, all composites of each."""
    for seed in range(30):
        add_five(tmp_path, f"c{seed}", seed, count=2)
    names = [f"c{seed}_7_{n}.jpg" for seed in range(30) for n in (1, 2)]
    (tmp_path / "HCOCO_train.txt").write_text("\n".join(names[:54]) + "\n")
    (tmp_path / "IHD_test.txt").write_text("HCOCO/composite_images/c27_7_1.jpg\r\n../../gone_1_1.jpg\n\n")
    table = select(tmp_path, tmp_path / "work")
    splits = dict(table.select("id", "split").iter_rows())
    assert splits["c27_7_1"] == "test" and list(splits.values()).count("test") == 2
    assert 2 <= list(splits.values()).count("validation") <= 16
    assert all(splits[f"c{seed}_7_1"] == splits[f"c{seed}_7_2"] for seed in range(27))
    results = dict(table.select("id", "reason").iter_rows())
    assert results["gone_1_1"] == "composite file missing"
    assert {results[name] for name in ("c27_7_2", "c28_7_1", "c29_7_2")} == {"id not listed"}
    assert all(results[name[:-4]] == KEPT for name in names[:54])


@pytest.mark.parametrize(
    "file, split",
    [
        ("HCOCO_train", "train"),
        ("trainlist", "train"),
        ("train_list", "train"),
        ("IHD_test", "test"),
        ("le50_test", "test"),
        ("TEST", "test"),
        ("pairs-val", "validation"),
        ("dev", "validation"),
        ("latest", None),
        ("retrain", None),
        ("interval", None),
        ("test_notes", None),
        ("2026", None),
    ],
)
def test_lists_are_called_by_a_whole_word(tmp_path, file, split):
    """Guards notes beside the pictures, which reject nothing."""
    (tmp_path / f"{file}.txt").write_text("a\n")
    assert read_lists([tmp_path]) == ({} if split is None else {"a": split})


def test_names_in_lists_keep_their_dots(tmp_path):
    (tmp_path / "test.txt").write_text("my.car\nmy.dog.jpg\nsub/x.1.JPEG\r\n\n")
    assert read_lists([tmp_path]) == {"my.car": "test", "my.dog": "test", "x.1": "test"}


def test_lists_that_share_photographs_or_names_are_told(tmp_path, capsys):
    """Guards test sets: what trains and is measured too is named, and a name in both lists is measured alone."""
    for seed, name in enumerate("abc"):
        add_five(tmp_path, name, seed, count=2)
    (tmp_path / "my_test.txt").write_text("a_7_1\nb_7_1\nb_7_2\n")
    (tmp_path / "my_train.txt").write_text("a_7_2\nb_7_1\nc_7_1\n")
    (tmp_path / "my_val.txt").write_text("b_7_1\n")
    splits = dict(select(tmp_path, tmp_path / "work").select("id", "split").iter_rows())
    assert {name for name, split in splits.items() if split == "test"} == {"a_7_1", "b_7_1", "b_7_2"}
    lines = capsys.readouterr().out.splitlines()
    assert "names in lists of several splits, of which test holds before validation and train: 1: b_7_1" in lines
    assert f"{tmp_path}: photographs with composites in several splits, as the lists say: 1: a.jpg" in lines
    (tmp_path / "my_test.txt").write_text("a_7_1\na_7_2\n")
    (tmp_path / "my_train.txt").write_text("c_7_1\n")
    select(tmp_path, tmp_path / "work")
    assert "several splits" not in capsys.readouterr().out, "composites that no list names are in no split"


def test_bad_pairs_are_counted_and_the_others_are_kept(tmp_path, capsys):
    for seed, name in enumerate(("good", "no_mask", "no_truth", "small", "cut", "cut_truth", "empty", "bad_mask")):
        add_before(tmp_path, name, seed)
    (tmp_path / "masks" / "no_mask.png").unlink()
    (tmp_path / "after" / "no_truth.png").unlink()
    write_image(tmp_path / "before" / "small.jpg", photograph(1, (40, 64)))
    for path in (
        tmp_path / "before" / "cut.jpg",
        tmp_path / "after" / "cut_truth.png",
        tmp_path / "masks/bad_mask.png",
    ):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    write_image(tmp_path / "masks" / "empty.png", np.zeros_like(MASK))
    write_image(tmp_path / "after" / "alone.png", photograph(1))
    write_image(tmp_path / "before" / f"{'x' * 210}.jpg", photograph(1))
    write_image(tmp_path / "before" / "good.png", photograph(1))
    results = reasons(tmp_path, tmp_path / "work")
    assert results.pop(f"{'x' * 210}.jpg") == "no file name"
    assert results == {
        "good": KEPT,
        "good (before good.png after good.png)": "two images of one name",
        "no_mask": "mask file missing",
        "no_truth": "image file missing",
        "small": "composite shape differs",
        "cut": "composite undecodable",
        "cut_truth": "image undecodable",
        "empty": "mask empty",
        "bad_mask": "mask undecodable",
    }
    assert "photographs of no composite: 1 left out: alone.png\n" in capsys.readouterr().out


def test_folders_that_hold_no_pairs_are_refused(tmp_path):
    with pytest.raises(UserError, match="neither before/ with after/ nor composite_images/ with real_images/ there"):
        select(tmp_path, tmp_path / "work")
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    with pytest.raises(UserError, match="before: no pictures there"):
        select(tmp_path, tmp_path / "work")


def test_captions_of_photographs_hold_for_all_their_composites(tmp_path):
    add_five(tmp_path / "HFlickr", "f1", count=2)
    add_five(tmp_path / "HFlickr", "f2", count=2)
    (tmp_path / "HFlickr" / "captions.json").write_text('{"f1.jpg": "a cow", "f2_7_1": "a dog"}')
    captions = read_captions(tmp_path, ["train"])
    assert captions == {"train/f1_7_1": ["a cow"], "train/f1_7_2": ["a cow"], "train/f2_7_1": ["a dog"]}


def test_captions_tell_no_omission_again(tmp_path, capsys):
    """Guards the output: what the selection leaves out is named once."""
    add_five(tmp_path, "f1", count=2)
    write_image(tmp_path / "real_images" / "alone.jpg", photograph(1))
    write_image(tmp_path / "masks" / "f1_7.jpg", MASK)
    select(tmp_path, tmp_path / "work")
    read_captions(tmp_path, SPLITS)
    assert capsys.readouterr().out.count("left out") == 2


def test_names_that_no_table_can_hold_are_counted(tmp_path):
    """Guards names that are no UTF-8, twice the same where they are replaced."""
    add_before(tmp_path, "good")
    for byte in (b"\xe9", b"\xe8"):
        os.link(tmp_path / "before" / "good.jpg", os.fsencode(tmp_path / "before") + b"/caf" + byte + b".jpg")
    table = select(tmp_path, tmp_path / "work")
    assert sorted(table["reason"]) == [KEPT, "no file name", "no file name"]


def test_pairs_of_one_name_in_several_splits_are_all_in_the_index(tmp_path):
    """Guards folders train/ and test/ with the same names: each composite has a name of its own for harmonize."""
    facts = {"box": (0, 0, 1, 1), "label": "", "caption": "", "width": 1, "height": 1, "sha256": ""}
    rows = [
        Row(id_, f"{split}/{id_}.png", "m.png", split=split, extras={"composite": f"{split}/{id_}.jpg"}, **facts)
        for split, id_ in (("train", "a"), ("train", "b"), ("test", "a"))
    ]
    write_index(tmp_path, rows)
    items, omissions = list_composites(tmp_path)
    assert not omissions and {id_: options["composite"] for id_, options in items} == {
        "train_a": str(tmp_path / "train" / "a.jpg"),
        "b": str(tmp_path / "train" / "b.jpg"),
        "test_a": str(tmp_path / "test" / "a.jpg"),
    }


def test_a_prepared_pair_knows_its_composite(tmp_path, fo):
    """Guards the way through the database: the photograph is the row's picture, the composite and its hash extras."""
    for seed in range(4):
        add_five(tmp_path / "in", f"c{seed}", seed, count=2)
    (tmp_path / "in" / "captions.json").write_text('{"c0": "a cow"}')
    recipe = {"name": "mine", "layout": "pairs", "dir": str(tmp_path / "in"), "splits": list(SPLITS)}
    recipe |= {"select": {}, "captions": {"given": True, "captioner": "backbone"}}
    manifest = prepare(recipe, "tiny", str(tmp_path / "work"))
    rows = {row.id: row for row in read_manifest(manifest)[1]}
    assert len(rows) == 8 and rows["c0_7_1"].caption == rows["c0_7_2"].caption == "a cow"
    row = rows["c3_7_2"]
    composite = read_image(manifest.parent / row.extras["composite"])
    assert np.array_equal(composite, read_image(tmp_path / "in" / "composite_images" / "c3_7_2.jpg"))
    assert len(row.extras["composite_sha256"]) == 64
    composites = dict(list_composites(manifest.parent)[0])
    assert len(composites) == 8 and composites["c3_7_2"]["plate"] is None
    assert np.array_equal(read_image(composites["c3_7_2"]["composite"]), composite)
    assert (manifest.parent / row.image).resolve() == (tmp_path / "in" / "real_images" / "c3.jpg").resolve()
