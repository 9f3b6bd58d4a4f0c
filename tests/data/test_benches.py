"""Benches of composition, one tiny set of our own in each layout; what is wrong is counted and named."""

import os
import shutil

import numpy as np
import pytest

from harmony.core.errors import UserError
from harmony.data.manifest import read_manifest
from harmony.data.preparation import prepare
from harmony.data.sources.benches import BENCHES, find_bench, read_place, select_cases
from harmony.data.sources.selection import KEPT, Rules
from harmony.evaluation.eval_sets import load_reconstruct, load_relight
from harmony.evaluation.exemplars import load_own_exemplars
from harmony.methods.inputs import list_composites, read_inputs
from harmony.pixels.images import read_image, write_image
from harmony.pixels.masks import read_mask

RULES = Rules(min_area=0, max_area=1)
BOX = np.zeros((48, 64), bool)
BOX[16:40, 20:44] = True  # where objects go
OBJECT = np.zeros((20, 20), bool)
OBJECT[4:16, 4:16] = True


def gray(level, shape=(48, 64)):
    return np.full((*shape, 3), level, np.uint8)


def add_cocoee(root, name, level=90):
    write_image(root / "GT_3500" / f"{name}_GT.png", gray(level))
    write_image(root / "Mask_bbox_3500" / f"{name}_mask.png", BOX)
    write_image(root / "Ref_3500" / f"{name}_ref.png", gray(200, (30, 20)))


def add_tf_icon(root, caption, number=1):
    folder = root / "same_domain" / caption
    write_image(folder / f"bg{number}.png", gray(90))
    write_image(folder / f"fg{number}_63d22.jpg", gray(200, (20, 20)))
    write_image(folder / f"fg{number}_mask.png", OBJECT)
    write_image(folder / "mask_bg_fg.jpg", np.kron(BOX, np.ones((2, 2), bool)))
    write_image(folder / "cp_bg_fg.jpg", gray(1, (16, 16)))
    write_image(folder / "dccf_image.jpg", gray(1, (16, 16)))


def add_murecom(root, category, count=2):
    for n in range(count):
        write_image(root / category / "bg" / f"{n}.jpg", gray(90))
        write_image(root / category / "bg" / f"{n}_bbox.png", BOX)
    for objects in ("fg1", "fg2", "fg3"):
        for n in range(2):
            write_image(root / category / objects / f"{n}.jpg", gray(200 + n, (20, 20)))
            write_image(root / category / objects / f"{n}.png", OBJECT)
            write_image(root / category / objects / f"{n}_bbox.png", OBJECT)
            write_image(root / category / objects / f"{n}_rmobj.jpg", gray(1, (20, 20)))
        write_image(root / category / objects / "0_aug" / "0.jpg", gray(1, (20, 20)))


def add_libcom(root, name, box="20 16 44 40\n"):
    write_image(root / "background" / f"{name}.jpg", gray(90))
    write_image(root / "foreground" / f"{name}.png", gray(200, (20, 20)))
    write_image(root / "foreground_mask" / f"{name}.png", OBJECT)
    (root / "bbox").mkdir(exist_ok=True)
    (root / "bbox" / f"{name}.txt").write_text(box)


def add_many(bench, root, count=3):
    """``count`` cases of a bench; of MureCom, whose backgrounds go with each object, three times as many."""
    if bench == "murecom":
        return add_murecom(root, "Tea_pot", count)
    for n in range(count):
        {"cocoee": add_cocoee, "tf_icon": add_tf_icon, "libcom": add_libcom}[bench](root, f"case {n}")


def select(root, bench):
    return select_cases(root, bench, RULES, root.parent / "work").table


def reasons(root, bench):
    return dict(select(root, bench).select("id", "reason").iter_rows())


@pytest.mark.parametrize("bench", BENCHES)
def test_every_bench_gives_composites_without_a_truth(tmp_path, bench, fo):
    """Guards the way from a bench to studies and to harmonize: backgrounds, places, exemplars, composites."""
    root = tmp_path / "in"
    add_many(bench, root)
    recipe = {"name": f"my_{bench}", "layout": "bench", "bench": bench, "dir": str(root), "splits": ["test"]}
    recipe |= {"select": {"min_area": 0.0, "max_area": 1.0}, "captions": {"given": True, "captioner": "backbone"}}
    manifest = prepare(recipe, "tiny", str(tmp_path / "work"))
    rows = read_manifest(manifest, "test")[1]
    assert len(rows) == (9 if bench == "murecom" else 3) and not any(row.has_truth for row in rows)
    items = load_own_exemplars(manifest, "test", 32, limit=2)
    assert len(items) == 2 and items.kind == "exemplar"
    c = items.composites[0]
    assert (c.background == 90).all() and abs(c.exemplar.mean() - 200) < 2 and (c.hole | ~c.mask).all()
    assert (c.caption, c.mask.mean() > 0.2) == (
        {"tf_icon": "case 0", "murecom": "a photo of a tea pot"}.get(bench, ""),
        True,
    )
    for load in (load_reconstruct, load_relight):
        with pytest.raises(UserError, match="knows no truths, its objects come from other pictures"):
            load(manifest, "test", 32)
    if bench == "cocoee":
        assert not (manifest.parent / "index.csv").exists(), "an exemplar without a mask cannot be pasted"
        return
    assert abs(c.instance[c.mask].mean() - 200) < 3 and (c.instance[~c.mask] == 90).mean() > 0.9
    composites, omissions = list_composites(manifest.parent)
    inputs = read_inputs({name: value for name, value in composites[0][1].items()})
    assert len(composites) == len(rows) and not omissions and (inputs.plate == 90).all()
    assert np.array_equal(inputs.mask, BOX), "a square object fills the square place"
    assert (inputs.background[inputs.mask] >= 198).all() and (inputs.background[~inputs.mask] == 90).all()


def test_captions_are_names_of_folders(tmp_path):
    add_tf_icon(tmp_path, "a tart, ultra realistic")
    assert find_bench("tf_icon").captions(tmp_path, ["test"]) == {
        "test/same_domain_a tart, ultra realistic": ["a tart, ultra realistic"]
    }


def test_only_tf_icon_has_captions(tmp_path):
    """Guards the other benches, whose folders are no captions whatever their files are called."""
    add_libcom(tmp_path, "bg1")
    assert find_bench("libcom").captions(tmp_path, ["test"]) == {}


def test_bad_cases_of_cocoee(tmp_path):
    root = tmp_path / "in"
    for name in ("good", "no_mask", "no_ref", "cut", "cut_ref", "other", "empty"):
        add_cocoee(root, name)
    (root / "Mask_bbox_3500" / "no_mask_mask.png").unlink()
    (root / "Ref_3500" / "no_ref_ref.png").unlink()
    for path in (root / "GT_3500" / "cut_GT.png", root / "Ref_3500" / "cut_ref_ref.png"):
        path.write_bytes(path.read_bytes()[:50])
    write_image(root / "Mask_bbox_3500" / "other_mask.png", BOX[:20])
    write_image(root / "Mask_bbox_3500" / "empty_mask.png", ~BOX & BOX)
    write_image(root / "GT_3500" / f"{'x' * 210}.png", gray(1))
    results = reasons(root, "cocoee")
    assert results.pop("x" * 210) == "no file name"
    assert results == {
        "good": KEPT,
        "no_mask": "mask file missing",
        "no_ref": "foreground file missing",
        "cut": "image undecodable",
        "cut_ref": "foreground undecodable",
        "other": "mask shape differs",
        "empty": "mask empty",
    }


def test_bad_cases_of_tf_icon_and_murecom(tmp_path):
    root = tmp_path / "in"
    for name in ("good", "no_bg", "no_fg", "no_mask", "no_place"):
        add_tf_icon(root, name)
    (root / "same_domain" / "no_bg" / "bg1.png").unlink()
    (root / "same_domain" / "no_fg" / "fg1_63d22.jpg").unlink()
    (root / "same_domain" / "no_mask" / "fg1_mask.png").unlink()
    (root / "same_domain" / "no_place" / "mask_bg_fg.jpg").unlink()
    assert reasons(root, "tf_icon") == {
        "same_domain_good": KEPT,
        "same_domain_no_bg": "image file missing",
        "same_domain_no_fg": "foreground file missing",
        "same_domain_no_mask": "foreground file missing",
        "same_domain_no_place": "no place for the object",
    }
    root = tmp_path / "in2"
    add_murecom(root, "Box", 1)
    shutil.copytree(root / "Box", os.fsdecode(os.fsencode(root) + b"/Caf\xe9"))
    (root / "Box" / "fg1" / "0.jpg").unlink()
    (root / "Box" / "fg2" / "0.png").unlink()
    assert reasons(root, "murecom") == {
        "Box_0_fg1": "foreground file missing",
        "Box_0_fg2": "foreground file missing",
        "Box_0_fg3": KEPT,
        **{f"Caf?_0_fg{n}": "no file name" for n in (1, 2, 3)},
    }


def test_libcom_takes_finished_composites_and_folders_of_pictures(tmp_path):
    """Guards its own composites, which hold over ours, references in a folder, and boxes that are none."""
    root = tmp_path / "in"
    for name in ("own", "other", "many"):
        add_libcom(root, name)
    write_image(root / "background" / "many.png", gray(90))
    write_image(root / "composite" / "own.png", gray(120))
    write_image(root / "composite_mask" / "own.jpg", BOX)
    write_image(root / "composite" / "other.png", gray(120, (20, 20)))
    write_image(root / "composite_mask" / "other.png", BOX)
    for folder, picture in (("foreground", gray(180, (20, 20))), ("foreground_mask", OBJECT)):
        (root / folder / "many.png").unlink()
        for n in range(1 if folder == "foreground" else 0, 3):
            write_image(root / folder / "many" / f"{n}.png", picture if n == 1 else np.zeros_like(picture))
    for n, box in enumerate(("", "1 2 3", "a b c d", "5 5 5 5", "900 900 950 950", "nan 1 2 3")):
        add_libcom(root, f"box{n}", box)
    table = select(root, "libcom")
    results = dict(table.select("id", "reason").iter_rows())
    (repeat,) = [name for name in results if name.startswith("many (")]
    assert repeat.endswith("background many.png)") and results.pop(repeat) == "two images of one name"
    assert results == {"own": KEPT, "other": "composite shape differs", "many": KEPT} | {
        f"box{n}": "no place for the object" for n in range(6)
    }
    ready = table.filter(table["id"] == "own").row(0, named=True)
    assert (ready["composite"], ready["mask"]) == ("composite/own.png", "composite_mask/own.jpg")
    row = table.filter(table["id"] == "many").row(0, named=True)
    assert read_image(root / row["composite"])[30, 30].tolist() == [180] * 3
    assert np.array_equal(read_mask(root / row["mask"]), BOX)


def test_what_changes_is_composed_again(tmp_path):
    root = tmp_path / "in"
    add_libcom(root, "a")
    first = select(root, "libcom")["composite"][0]
    time = (root / first).stat().st_mtime_ns
    assert select(root, "libcom")["composite"][0] == first and (root / first).stat().st_mtime_ns == time
    write_image(root / "foreground" / "a.png", gray(20, (20, 20)))
    second = select(root, "libcom")["composite"][0]
    assert second != first and read_image(root / second)[30, 30].tolist() == [20] * 3


def test_places_in_other_sizes(tmp_path):
    write_image(tmp_path / "place.png", np.kron(BOX, np.ones((2, 2), bool)))
    assert read_place(tmp_path / "place.png", (64, 48)) == (20, 16, 44, 40)


@pytest.mark.parametrize("text", ["20 16 44 40", "20,16,44,40", "[20, 16, 44, 40]\n", "(20.0; 16; 44; 40)"])
def test_places_in_any_writing(tmp_path, text):
    """Guards boxes that other programs write: they are read as in index.csv."""
    (tmp_path / "place.txt").write_text(text)
    assert read_place(tmp_path / "place.txt", (64, 48)) == (20, 16, 44, 40)


def test_what_is_no_bench_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing in the layout of cocoee there; see datasets/cocoee/README.md"):
        select(tmp_path, "cocoee")
    recipe = {"name": "x", "layout": "bench", "bench": "dreambench", "dir": str(tmp_path), "splits": ["test"]}
    recipe |= {"select": {}, "captions": {"given": True, "captioner": "backbone"}}
    with pytest.raises(UserError, match="dataset.bench=dreambench: no such bench; choose one of cocoee, tf_icon"):
        prepare(recipe, "tiny", str(tmp_path / "work"))
