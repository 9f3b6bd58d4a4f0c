"""COCO's JSON: masks as pycocotools reads them, splits and classes; what is wrong is counted and named."""

import json

import numpy as np
import pytest

from harmony.core.errors import UserError
from harmony.core.row import SPLITS
from harmony.data.manifest import read_manifest
from harmony.data.preparation import prepare
from harmony.data.sources.coco import read_segmentation, select_instances
from harmony.data.sources.selection import KEPT, Rules
from harmony.pixels.images import write_image
from harmony.pixels.masks import read_mask

SQUARE = [[10, 8, 30, 8, 30, 24, 10, 24]]  # in 40 x 32
BOX = [10, 8, 20, 16]


class Export:
    """Writes photographs and one file of annotations."""

    def __init__(self, file, photographs):
        self.file, self.photographs, self.images, self.annotations = file, photographs, [], []

    def image(self, name, exists=True):
        if exists:
            write_image(self.photographs / name, np.full((32, 40, 3), 90, np.uint8))
        self.images.append({"id": len(self.images) + 1, "file_name": name, "width": 40, "height": 32})
        return self

    def instance(self, segmentation=SQUARE, box=BOX, category=1, **values):
        facts = {"id": len(self.annotations) + 1, "image_id": len(self.images), "category_id": category}
        self.annotations.append(facts | {"bbox": box, "segmentation": segmentation, "iscrowd": 0} | values)
        return self

    def write(self, **changes):
        categories = [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}]
        content = {"images": self.images, "annotations": self.annotations, "categories": categories}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(content | changes))


def coco(root, name="val2017"):
    return Export(root / "annotations" / f"instances_{name}.json", root / name)


def select(root, work=None, splits=SPLITS, **rules):
    return select_instances(root, splits, Rules(**rules), work or root / "work").table


def test_run_lengths_are_pycocotools_own():
    """Guards the compressed text: what pycocotools 2.0.11 writes for these masks, and the same runs as numbers."""
    small = np.zeros((6, 5), bool)
    small[1:4, 2:4] = small[5, 4] = True
    assert np.array_equal(read_segmentation({"size": [6, 5], "counts": "=3304N"}, 6, 5), small)
    runs = {"size": [6, 5], "counts": [13, 3, 3, 3, 7, 1]}
    assert np.array_equal(read_segmentation(runs, 6, 5), small)
    large = np.zeros((100, 90), bool)
    large[10:80, 20:60] = large[50, 70] = True
    text = "jn1V2n" + "0" * 78 + "`P1kM_k0"
    assert np.array_equal(read_segmentation({"size": [100, 90], "counts": text}, 100, 90), large)


def test_polygons_cover_the_pixels_whose_center_they_hold():
    """Guards coordinates: 10 to 30 are 20 pixels, as in pycocotools; several polygons are one mask."""
    mask = np.zeros((32, 40), bool)
    mask[8:24, 10:30] = True
    assert np.array_equal(read_segmentation(SQUARE, 32, 40), mask)
    mask[0:4, 0:4] = True
    assert np.array_equal(read_segmentation([*SQUARE, [0, 0, 4, 0, 4, 4, 0, 4]], 32, 40), mask)


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [32, 40], "counts": [5, 3]},
        {"size": [40, 32], "counts": [1280]},
        {"size": [32, 40], "counts": [-1, 1281]},
        {"size": [32, 40], "counts": [9223372036854775807, 9223372036854775807]},
        {"size": [32, 40], "counts": "\x00"},
        {"size": [32, 40], "counts": "`" * 500},
        {"size": [32, 40]},
        [[1, 2, 3]],
        [[1, 2, 3, 4]],
        [["a", 2, 3, 4, 5, 6]],
        [[float("nan")] * 6],
        "polygon",
    ],
)
def test_damaged_masks_are_counted(tmp_path, segmentation):
    coco(tmp_path).image("a.jpg").instance(segmentation).image("b.jpg").instance().write()
    assert dict(select(tmp_path).select("id", "reason").iter_rows()) == {"a": "mask undecodable", "b": KEPT}


def test_each_annotation_is_a_row(tmp_path):
    """Guards photographs with several instances, classes, and masks that lie in the work folder."""
    export = (
        coco(tmp_path, "train2017")
        .image("a.jpg")
        .instance()
        .instance([[0, 0, 20, 0, 20, 20, 0, 20]], [0, 0, 20, 20], 7)
    )
    export.image("sub/b.png").instance().write()
    table = select(tmp_path)
    assert table.select("split", "id", "label", "reason", "image").rows() == [
        ("train", "a_1", "cat", KEPT, "train2017/a.jpg"),
        ("train", "a_2", "dog", KEPT, "train2017/a.jpg"),
        ("train", "b", "cat", KEPT, "train2017/sub/b.png"),
    ]
    assert table.select("x0", "y0", "x1", "y1").row(0) == (0.25, 0.25, 0.75, 0.75)
    assert read_mask(tmp_path / table["mask"][1]).sum() == 400
    assert table["mask"][0].startswith("work/annotations/train/a_1-")
    dogs = select(tmp_path, classes=["Dog"])
    assert dogs["reason"].to_list() == ["class not wanted", KEPT, "class not wanted"]
    assert select(tmp_path, max_samples=1)["reason"].to_list() == [KEPT, *["over max_samples"] * 2]
    with pytest.raises(UserError, match="has no class cow; it has cat, dog"):
        select(tmp_path, classes=["cow"])


def test_a_mask_is_drawn_again_for_another_size(tmp_path):
    """Guards exports that give a photograph its size later: the same polygon is another mask."""
    export = coco(tmp_path).image("a.jpg").instance()
    for width, height in ((40, 32), (80, 32), (80, 64)):
        export.images[0] |= {"width": width, "height": height}
        export.write()
        mask = read_mask(tmp_path / select(tmp_path, min_area=0)["mask"][0])
        assert mask.shape == (height, width) and mask[8:24, 10:30].all() and mask.sum() == 320


def test_only_as_many_masks_are_drawn_as_samples_are_wanted(tmp_path):
    """Guards max_samples on all of COCO; where masks turn out to be damaged, those behind them take their place."""
    export, bad_polygon = coco(tmp_path).image("a.jpg"), [[1, 2, 3]]
    ids = sorted(f"a_{number}" for number in range(1, 601))
    for number in range(1, 601):
        export.instance(bad_polygon if f"a_{number}" in ids[:252] else SQUARE)
    export.write()
    table = select(tmp_path, splits=["validation", "test"], max_samples=3)
    assert table["id"].to_list() == ids
    assert table["reason"].to_list() == ["mask undecodable"] * 252 + [KEPT] * 3 + ["over max_samples"] * 345
    assert len(list((tmp_path / "work").rglob("*.png"))) < 300
    everything = select(tmp_path, splits=["validation", "test"])
    assert everything[252:255].equals(table[252:255]) and set(everything["reason"][252:]) == {KEPT}


def test_bad_entries_are_counted_and_the_others_are_kept(tmp_path, capsys):
    export = coco(tmp_path).image("good.jpg").instance().image("none.jpg").image("gone.jpg", exists=False).instance()
    export.image("crowd.jpg").instance(iscrowd=1).image("small.jpg").instance(box=[10, 8, 2, 2])
    export.image("bare.jpg").instance([]).image("odd.jpg").instance(box="x").image("kind.jpg").instance(category=99)
    export.image("../../out.jpg", exists=False).instance().image("/etc/passwd", exists=False).instance()
    export.image("good.png").instance()
    export.annotations += [{"id": 99}, "x", {"id": 100, "image_id": [1]}, {"id": 101, "image_id": 12345}]
    export.images += [{"id": 999}, None]
    export.write()
    results = dict(select(tmp_path).select("id", "reason").iter_rows())
    repeats = {
        name: reason for name, reason in results.items() if name.startswith("good (val2017 good.png, annotation ")
    }
    assert list(repeats.values()) == ["two images of one name"]
    assert {name: reason for name, reason in results.items() if name not in repeats} == {
        "good": KEPT,
        "none": "no instance",
        "gone": "image file missing",
        "crowd": "group",
        "small": "too small",
        "bare": "box without mask",
        "odd": "damaged row",
        "kind": "damaged row",
        "out": "no file name",
        "passwd": "no file name",
    }
    out = capsys.readouterr().out
    assert "2 of 13 images left out" in out and "4 of 14 annotations left out" in out


def test_splits_by_the_names_of_files(tmp_path):
    """Guards COCO, which has no test split of its own: half of validation; Roboflow's and FiftyOne's exports."""
    for name in ("train2017", "val2017"):
        export = coco(tmp_path, name)
        for i in range(20):
            export.image(f"{name}{i}.jpg").instance()
        export.write()
    table = select(tmp_path)
    assert set(table.filter(table["image"].str.starts_with("train2017"))["split"]) == {"train"}
    assert set(table.filter(table["image"].str.starts_with("val2017"))["split"]) == {"validation", "test"}
    for folder, split in (("train", "train"), ("valid", "validation"), ("test", "test")):
        place = tmp_path / "roboflow" / folder
        Export(place / "_annotations.coco.json", place).image(f"{folder}.jpg").instance().write()
    assert select(tmp_path / "roboflow").select("split", "id").rows() == [
        ("test", "test"),
        ("train", "train"),
        ("validation", "valid"),
    ]
    export = Export(tmp_path / "export" / "labels.json", tmp_path / "export" / "data")
    for i in range(30):
        export.image(f"{i}.jpg").instance()
    export.write()
    assert set(select(tmp_path / "export")["split"]) == {*SPLITS}


def test_what_is_no_coco_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither annotations/instances_NAME.json nor"):
        select(tmp_path)
    (tmp_path / "labels.json").write_text('{"labels": []}')
    with pytest.raises(UserError, match="labels.json: no COCO instances, it needs the lists images, annotations"):
        select(tmp_path)


def test_prepared_instances(tmp_path, fo):
    """Guards the way through the database: a truncated photograph and a mask without a pixel are found by looking."""
    export = coco(tmp_path / "in", "train2017").image("a.jpg").instance().instance()
    export.image("cut.jpg").instance().image("empty.jpg").instance({"size": [32, 40], "counts": [1280]}).write()
    photograph = tmp_path / "in" / "train2017" / "cut.jpg"
    photograph.write_bytes(photograph.read_bytes()[:300])
    recipe = {"name": "mycoco", "layout": "coco", "dir": str(tmp_path / "in"), "splits": list(SPLITS)}
    recipe |= {"select": {}, "captions": {"given": True, "captioner": "backbone"}}
    manifest = prepare(recipe, "tiny", str(tmp_path / "work"))
    rows = read_manifest(manifest)[1]
    assert [(row.id, row.label, row.box) for row in rows] == [(i, "cat", (10, 8, 30, 24)) for i in ("a_1", "a_2")]
    text = (manifest.parent / "selection.csv").read_text()
    assert "train,cut,image undecodable" in text and "train,empty,mask empty" in text
