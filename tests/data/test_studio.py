"""The studio: scenes are pure functions of their index, splits hold what they promise, the bundled files are whole."""

import csv
import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from harmony.core.errors import UserError
from harmony.data.sources.studio import files, rendering
from harmony.data.sources.studio.scenes import COLORS, GROUNDS, LIGHTS, is_test_combination, scene
from harmony.data.sources.studio.shapes import KINDS
from harmony.pixels.images import read_image, resize, write_image

BUNDLED = Path(__file__).resolve().parents[2] / "datasets" / "studio"
SPLITS = {"train": 352, "validation": 64, "test": 96}
GOLDEN = ("833dbe7693ad0d78", "boat", "white", "glossy", "sand", "overcast", "noon")  # scene 13, as bundled


@pytest.fixture(scope="module")
def scenes():
    return [scene(i) for i in range(512)]


def test_a_scene_depends_on_its_index_alone(scenes):
    """Guards reproducibility: order of calls, other scenes and other seeds change nothing."""
    assert [scene(i) for i in (400, 3, 13)] == [scenes[400], scenes[3], scenes[13]]
    s = scene(13)
    assert (s.id, s.kind, s.color, s.finish, s.ground, s.light, s.relight) == GOLDEN
    assert scene(13, seed=1) != s and len({s.id for s in scenes}) == 512


def test_splits_have_their_shares(scenes):
    assert Counter(s.split for s in scenes) == SPLITS


def test_held_out_combinations_are_seen_in_the_test_split_alone(scenes):
    """Guards the generalisation test: no training picture, under either of its lights, shows a held-out combination."""
    for s in scenes + [scene(i) for i in range(5000, 5400)]:
        if s.split == "test":
            assert is_test_combination(s.kind, s.color, s.light), s
        else:
            assert not is_test_combination(s.kind, s.color, s.light) and not is_test_combination(
                s.kind, s.color, s.relight
            ), s
        assert s.light != s.relight
    kept = [is_test_combination(k, c, v) for k in KINDS for c in COLORS for v in LIGHTS]
    assert 0.1 < sum(kept) / len(kept) < 0.2


def test_scenes_show_the_whole_range(scenes):
    """Guards variety: at least 12 kinds, 8 colors, 3 finishes, 6 grounds, 5 lights; others in a third of them."""
    seen = {
        name: {getattr(s, name) for s in scenes} for name in ("kind", "color", "finish", "ground", "light", "backdrop")
    }
    assert seen["kind"] == set(KINDS) and len(KINDS) >= 12 and all(len(parts()) >= 2 for parts in KINDS.values())
    assert seen["color"] == set(COLORS) and len(COLORS) == 8 and len(seen["finish"]) == 3
    assert seen["ground"] == set(GROUNDS) and seen["light"] == set(LIGHTS) and len(GROUNDS) == 6 and len(LIGHTS) == 5
    assert 0.26 < np.mean([bool(s.others) for s in scenes]) < 0.41
    s = scenes[0]
    assert s.caption() == f"a {s.color} {s.kind} on {s.ground}, {LIGHTS[s.light].words}"


@pytest.mark.parametrize("split", SPLITS)
def test_bundled_files_are_whole(split):
    """Guards the bundled set: every row of every table has its files, of the right size and content."""
    folder = BUNDLED / split

    def table(name):
        with open(folder / name, newline="") as file:
            return list(csv.DictReader(file))

    rows = {row["ImageID"]: row for row in table("metadata/scenes.csv")}
    captions = json.loads((folder / "metadata" / "human_captions.json").read_text())
    boxes = {row["ImageID"]: row for row in table("labels/detections.csv")}
    masks = {row["ImageID"]: row for row in table("labels/segmentations.csv")}
    listed = [row["ImageID"] for row in table("metadata/image_ids.csv")]
    assert len(rows) == SPLITS[split] and set(listed) == set(rows) == set(captions) == set(boxes) == set(masks)
    for sub, suffix in (("data", "jpg"), ("plates", "jpg"), ("relit", "jpg"), ("shadows", "png")):
        assert {p.name for p in (folder / sub).iterdir()} == {f"{id_}.{suffix}" for id_ in rows}
    for id_, row in rows.items():
        s = scene(int(row["index"]))
        assert (s.id, s.split) == (id_, split) and captions[id_] == [s.caption(), s.caption(s.relight)]
        for caption, light in zip(captions[id_], (row["light"], row["relight"]), strict=True):
            assert caption == f"a {row['color']} {row['kind']} on {row['ground']}, {LIGHTS[light].words}"
        images = [read_image(folder / sub / f"{id_}.jpg") for sub in ("data", "plates", "relit")]
        assert {image.shape for image in images} == {(128, 128, 3)}
        mask = cv2.imread(
            str(folder / "labels" / "masks" / id_[0].upper() / masks[id_]["MaskPath"]), cv2.IMREAD_GRAYSCALE
        )
        shadow = cv2.imread(str(folder / "shadows" / f"{id_}.png"), cv2.IMREAD_GRAYSCALE)
        assert mask.shape == shadow.shape == (128, 128) and set(np.unique(mask)) <= {0, 255}
        inside = mask > 0
        assert inside.any() and not (inside & (shadow > 0)).any()
        columns, lines = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
        found = np.array([columns[0], columns[-1] + 1, lines[0], lines[-1] + 1]) / 128
        assert np.allclose([float(boxes[id_][k]) for k in ("XMin", "XMax", "YMin", "YMax")], found, atol=1e-6)
        changed = np.abs(images[0].astype(int) - images[1]).mean(2)
        assert changed[inside].mean() > 1.5 * changed[~inside & (shadow == 0)].mean(), "the object is where the mask is"


def test_the_bundle_is_small():
    """Guards the repository's size."""
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) <= 12 * 2**20


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize("index", [13])
def test_a_render_agrees_with_the_bundled_picture(index):
    """Guards the renderer: scene, camera, lights and tone curve are still those that made the bundled files."""
    pytest.importorskip("mitsuba", reason="needs the extra: pip install -e '.[studio]'")
    s = scene(index)
    frames = rendering.render(s, size=64, samples=16)
    bundled = {name: path for name, path in files.scene_files(s, BUNDLED).items()}
    for name in ("image", "relit", "plate"):
        assert psnr(resize(read_image(bundled[name]), 64, 64), getattr(frames, name)) > 25, name
    mask = cv2.imread(str(bundled["mask"]), cv2.IMREAD_GRAYSCALE)[::2, ::2] > 0
    union = (mask | frames.mask).sum()
    assert (mask & frames.mask).sum() / union > 0.85
    assert not (frames.mask & frames.shadow).any()


def test_generate_goes_on(tmp_path, monkeypatch, render_here):
    """Guards resumption: finished scenes are not rendered again, and the tables list all of them."""
    rendered = []

    def render_to(s, root, size, samples, plate):
        rendered.append(s.index)
        for path in files.scene_files(s, root).values():
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.zeros((size, size, 3), np.uint8)
            pixels[2:6, 3:7] = 255
            write_image(path, pixels if path.suffix == ".jpg" else pixels[..., 0])
        if len(rendered) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "render_files", render_to)
    with pytest.raises(KeyboardInterrupt):
        files.generate(tmp_path, 16, size=8)
    files.generate(tmp_path, 16, size=8)
    assert sorted(rendered) == list(range(16)), "each scene once"
    files.generate(tmp_path, 16, size=8)
    assert len(rendered) == 16
    for split, count in {"train": 11, "validation": 2, "test": 3}.items():
        with open(tmp_path / split / "labels" / "segmentations.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == count
    assert not list(tmp_path.rglob("*.partial"))


def test_without_mitsuba_it_is_named(monkeypatch):
    """Guards the message: what to install, in one line."""
    monkeypatch.setitem(__import__("sys").modules, "drjit", None)
    rendering.mitsuba.cache_clear()
    with pytest.raises(UserError, match="make install in a clone, or pip install 'mitsuba"):
        rendering.mitsuba()
    rendering.mitsuba.cache_clear()
