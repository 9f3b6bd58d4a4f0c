"""What a kit is trained on: rows of a folder in Open Images layout, and squares of decoded pictures."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from harmony.data.manifest import read_manifest
from harmony.data.sources import studio
from harmony.data.sources.pixels import PixelPool, is_render, prepare_kit, rows_of
from harmony.pixels.images import read_image, write_image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three splits of photographs, 60 x 40, two sources; one undecodable, one whose largest box is too small."""
    root = tmp_path_factory.mktemp("photos") / "mini"
    for split in ("train", "validation", "test"):
        folder = root / split
        for sub in ("data", "labels/masks/A", "metadata"):
            (folder / sub).mkdir(parents=True)
        rows, sources = [], []
        for n, (name, boxes) in enumerate(
            {"a1": [(0.1, 0.5), (0.0, 0.9)], "a2": [(0.2, 0.6)], "a3": [(0.4, 0.5)]}.items()
        ):
            write_image(folder / "data" / f"{name}.jpg", np.full((40, 60, 3), 40 * n + 20, np.uint8))
            sources.append(f"{name},{'ccp' if n == 0 else 'secret'}")
            for k, (low, high) in enumerate(boxes):
                mask = np.zeros((40, 60), bool)
                mask[int(40 * low) : int(40 * high), int(60 * low) : int(60 * high)] = True
                write_image(folder / "labels/masks/A" / f"{name}_{k}.png", mask)
                rows.append(f"{name}_{k}.png,{name},/m/cat,b{k},{low},{high},{low},{high},0,")
        rows.append("a4_0.png,a4,/m/cat,b,0.1,0.9,0.1,0.9,0,")
        (folder / "data" / "a4.jpg").write_bytes(b"no picture")
        sources.append("a4,ccp")
        header = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
        (folder / "labels" / "segmentations.csv").write_text("\n".join([header, *rows]) + "\n")
        (folder / "metadata" / "sources.csv").write_text("\n".join(["ImageID,Source", *sources]) + "\n")
        (folder / "metadata" / "classes.csv").write_text("/m/cat,Cat\n")
    return root


def test_rows_take_the_largest_instance_and_leave_out_what_is_broken(photos, tmp_path):
    """Guards the gathering: largest box within 2 % .. 80 %, undecodable pictures left out, boxes from the mask."""
    rows = rows_of(photos / "train", "train", tmp_path)
    assert [row.id for row in rows] == ["a1", "a2"], "a1's 81 % box and a3's 1 % box are out of range, a4 is no picture"
    assert rows[0].mask.endswith("a1_0.png") and rows[0].box == (6.0, 4.0, 30.0, 20.0)
    assert rows[0].caption == "a photo of a cat" and (rows[0].width, rows[0].height) == (60, 40)
    assert all((tmp_path / row.image).exists() and (tmp_path / row.mask).exists() for row in rows)
    assert [row.id for row in rows_of(photos / "train", "train", tmp_path, ["ccp"])] == ["a1"]


def test_a_studio_scene_gives_two_rows(studio_rows):
    """Guards the captions of relit pictures: the row of light B shows the relit file and names light B."""
    rows = rows_of(ROOT / "datasets" / "studio" / "validation", "validation", ROOT)
    lit = {row.id: row for row in rows}
    assert len(rows) == 128 and all(is_render(row) for row in rows)
    for row in rows[:20:2]:
        other = lit[f"{row.id}b"]
        assert "/data/" in row.image and "/relit/" in other.image and row.mask == other.mask
        assert row.caption.split(",")[0] == other.caption.split(",")[0] and row.caption != other.caption


def test_kit_manifest_joins_renders_and_permitted_photographs(photos, tmp_path, monkeypatch):
    """Guards what shipped weights see: only photographs of the listed sources train; the test split may hold any."""
    small = tmp_path / "studio_small"
    source = ROOT / "datasets" / "studio" / "validation"
    for split in ("train", "validation", "test"):
        shutil.copytree(source / "labels", small / split / "labels")
        shutil.copytree(source / "metadata", small / split / "metadata")
        (small / split / "data").mkdir()
        for path in sorted((source / "data").iterdir())[:2]:
            shutil.copy(path, small / split / "data")
    monkeypatch.setattr(studio, "generate", lambda root, *args, **options: root)
    recipe = {"name": "kit", "dir": str(small), "count": 0, "size": 16, "photos": str(photos), "sources": ["ccp"]}
    rows = read_manifest(prepare_kit(recipe, tmp_path / "work"))[1]
    photographs = {split: [r.id for r in rows if r.split == split and r.id.startswith("a") and len(r.id) == 2] for split
    in
                   ("train", "validation", "test")}  # fmt: skip
    assert photographs == {"train": ["a1"], "validation": ["a1"], "test": ["a1", "a2"]}
    assert len(rows) == 3 * 2 + 4


def test_squares_without_share_are_the_deterministic_ones(small_manifest, tmp_path):
    """Guards measurement: the test pool gives the whole picture around the instance, the same every time."""
    manifest = small_manifest(tmp_path)
    pool = PixelPool(manifest, "test", 128)
    item = pool[2]
    assert torch.equal(item["image"], pool[2]["image"]) and item["render"] is True
    pixels = read_image(tmp_path / pool.rows[2].image)
    assert torch.equal(((item["image"] + 1) * 127.5).round().permute(1, 2, 0), torch.from_numpy(pixels).float())
    assert item["caption"] == pool.rows[2].caption


def test_photographs_are_cropped_at_random_and_renders_are_not(photos, small_manifest, tmp_path):
    """Guards augmentation: crops of a photograph have the wanted share of its side and stay inside it."""
    from harmony.data.manifest import write_manifest

    rows = rows_of(photos / "train", "train", tmp_path)
    write_manifest(tmp_path / "manifest.jsonl", rows, "photos")
    pool = PixelPool(tmp_path / "manifest.jsonl", "train", 8, share=(0.35, 0.9), seed=1)
    height, width = pool.pictures[0].shape[:2]
    crops = [pool.crop(0) for _ in range(50)]
    low, high = 0.35 * min(width, height), 0.9 * min(width, height)
    assert all(low - 1 <= c.side <= high and c.inside(width, height)[2] - c.x0 == c.side for c in crops)
    assert len({(c.x0, c.y0, c.side) for c in crops}) > 40
    again = PixelPool(tmp_path / "manifest.jsonl", "train", 8, share=(0.35, 0.9), seed=1)
    assert [again.crop(0) for _ in range(50)] == crops, "the crops depend on the seed"
    render = PixelPool(small_manifest(tmp_path / "renders"), "train", 64, share=(0.35, 0.9))
    assert {render.crop(0).side for _ in range(5)} == {128}
    flipped = {render[0]["image"].numpy().tobytes() for _ in range(20)}
    assert len(flipped) == 2, "a render is only mirrored"
