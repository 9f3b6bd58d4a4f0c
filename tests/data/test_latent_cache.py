"""The latent cache holds what a direct computation gives, survives kills, and refuses what it was not made for."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from harmony.core.errors import UserError
from harmony.data import latent_cache as latents
from harmony.data.latent_cache import Cache, Latents, Recipe, cache_key, describe, example
from harmony.data.latent_data import build
from harmony.data.manifest import read_manifest, write_manifest
from harmony.models.backbone import Backbone
from harmony.pixels.hints import hint
from harmony.pixels.images import to_model, write_image

HINTS = {"color": {"blur": 1.25, "normalize": True}, "structure": {"low": 100, "high": 200}}
RECIPE = Recipe("jitter", "train", 2, HINTS, seed=3)
ITEMS = 24  # 12 rows, 2 variants


@pytest.fixture(scope="module")
def backbone(random_backbone):
    return Backbone(str(random_backbone))


@pytest.fixture(scope="module")
def manifest(small_manifest, tmp_path_factory):
    return small_manifest(tmp_path_factory.mktemp("manifest"))


@pytest.fixture
def small_shards(monkeypatch):
    """Four shards instead of one."""
    monkeypatch.setattr(latents, "SHARD", 7)


@pytest.fixture
def cache(backbone, manifest, small_shards, tmp_path):
    return built(manifest, "train", backbone, RECIPE, tmp_path / "cache", lambda line: None)


def built(manifest, split, backbone, recipe, root, say=print):
    return build([Cache(manifest, split, backbone, recipe, root, say)])[0]


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def ages(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_items_equal_a_direct_computation(cache, backbone, manifest):
    """Guards the contents: both posteriors, the hole by nearest, coverage, hints, and which item belongs to which
    row.
    """
    rows, data = read_manifest(manifest, "train")[1], Latents(cache)
    assert len(data) == ITEMS
    for i in (0, 1, 13, ITEMS - 1):
        item, e = data[i], example(rows[i // 2], manifest.parent, RECIPE, backbone.resolution, i % 2)
        x = to_model(e.image)[None]
        hole = torch.from_numpy(e.hole)[None, None].float()
        assert (item["row"], item["index"]) == (i // 2, i)
        assert torch.allclose(item["moments"], backbone.vae.encode(x).latent_dist.parameters[0], atol=2e-3, rtol=2e-3)
        masked = backbone.vae.encode(torch.where(hole > 0, torch.zeros_like(x), x)).latent_dist.parameters[0]
        assert torch.allclose(item["masked_moments"], masked, atol=2e-3, rtol=2e-3)
        assert torch.equal(item["hole"], hole[0, :, ::4, ::4])
        covered = torch.from_numpy(e.mask).float().view(8, 4, 8, 4).mean((1, 3))
        assert torch.allclose(item["weight"][0], covered, atol=0.5 / 255)
        for branch, parameters in HINTS.items():
            pixels = hint(branch, e.image, e.mask, cell=4, **parameters)
            assert torch.equal(
                (item[f"hint_{branch}"] * 255).round(), torch.from_numpy(pixels).permute(2, 0, 1).float()
            )
            assert item[f"hint_{branch}"].max() <= 1
    moments = torch.stack([data[i]["moments"] for i in range(ITEMS)])
    assert not torch.equal(moments[0], moments[1]), "the variants of a row have crops of their own"
    assert (moments[:, :4].std() > 0) and torch.isfinite(moments).all()


def test_only_the_hints_of_a_training_are_read(cache):
    """Guards the loader's time: what a training does not use never leaves the file."""
    few, every = (Latents(cache, branches=branches)[3] for branches in (["color"], None))
    assert set(every) - set(few) == {"hint_structure"} and torch.equal(few["hint_color"], every["hint_color"])
    assert not any(name.startswith("hint_") for name in Latents(cache, branches=[])[0])


def test_examples_depend_on_row_and_variant_alone(backbone, manifest):
    """Guards determinism: an item is the same whatever was made before it; the hole holds the instance."""
    rows = read_manifest(manifest, "train")[1]
    first = example(rows[4], manifest.parent, RECIPE, backbone.resolution, 1)
    example(rows[5], manifest.parent, RECIPE, backbone.resolution, 0)
    again = example(rows[4], manifest.parent, RECIPE, backbone.resolution, 1)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.hole, again.hole)
    assert (first.hole | ~first.mask).all()
    other = example(rows[4], manifest.parent, replace(RECIPE, seed=4), backbone.resolution, 1)
    assert not (np.array_equal(first.hole, other.hole) and np.array_equal(first.image, other.image))


def test_build_is_deterministic(cache, backbone, manifest, tmp_path):
    again = built(manifest, "train", backbone, RECIPE, tmp_path / "again", lambda line: None)
    assert again.name == cache.name and len(shards(cache)) == 4
    assert shards(again) == shards(cache)


def test_a_backbone_with_its_channels_last_fills_the_same_cache(
    cache, manifest, random_backbone, small_shards, tmp_path, channels_last
):
    """Guards the GPU's layout: moments that lie in memory in another order are stored in the usual one."""
    backbone = Backbone(str(random_backbone))
    moments = backbone.moments(torch.zeros(2, 3, 32, 32))
    assert not moments.is_contiguous(), "or nothing is tested here"
    folder = built(manifest, "train", backbone, RECIPE, tmp_path / "channels_last", lambda line: None)
    assert folder.name == cache.name
    for i in (0, ITEMS - 1):
        for name, value in Latents(cache)[i].items():
            torch.testing.assert_close(Latents(folder)[i][name], value, atol=2e-3, rtol=2e-3)


def test_a_stopped_build_goes_on(backbone, manifest, small_shards, tmp_path, monkeypatch, cache):
    """Guards resumption: what the first go finished is not redone, and the result is that of an unbroken build."""
    root = tmp_path / "stopped"
    original, written = latents.write_shard, []

    def stop_after_two(path, tensors):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return original(path, tensors)

    monkeypatch.setattr(latents, "write_shard", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        built(manifest, "train", backbone, RECIPE, root, lambda line: None)
    folder = root / cache.name
    before = ages(folder)
    assert sorted(before) == ["00000.safetensors", "00001.safetensors"]
    with pytest.raises(UserError, match="no complete latent cache"):
        Latents(folder)
    monkeypatch.setattr(latents, "write_shard", original)
    said = []
    built(manifest, "train", backbone, RECIPE, root, said.append)
    after = ages(folder)
    assert {name: after[name] for name in before} == before and len(said) == 2
    assert shards(folder) == shards(cache)
    built(manifest, "train", backbone, RECIPE, root, said.append)
    assert ages(folder) == after and len(said) == 2, "a complete cache is left alone, silently"


@pytest.mark.parametrize("harm", ["flip", "truncate", "record", "index"])
def test_damage_is_found_and_mended(cache, backbone, manifest, harm):
    """Guards the checksums: a changed byte, a cut shard, a torn record or index are rebuilt, never trained on."""
    good = shards(cache)
    path = cache / "00001.safetensors"
    if harm == "flip":
        content = bytearray(good[path.name])
        content[-100] ^= 1
        path.write_bytes(content)
    elif harm == "truncate":
        path.write_bytes(good[path.name][:-50])
    elif harm == "record":
        (cache / "00001.json").write_text('{"sha2')
    else:
        (cache / "index.json").write_text('{"key": "')
        with pytest.raises(UserError, match="index.json is damaged"):
            Latents(cache)
    said, before = [], ages(cache)
    built(manifest, "train", backbone, RECIPE, cache.parent, said.append)
    assert shards(cache) == good and len(Latents(cache)) == ITEMS
    redone = {name for name, age in ages(cache).items() if age != before[name]}
    assert redone == (set() if harm == "index" else {path.name})
    assert any("00001.safetensors is damaged" in line for line in said) == (harm != "index")


def test_foreign_caches_are_refused_by_name(cache, backbone, manifest):
    """Guards the key: everything that decides the contents is in it, and the refusal says what differs."""
    rows = read_manifest(manifest, "train")[1]
    fitting = describe(backbone, RECIPE, rows)
    Latents(cache, fitting)

    class Larger(Backbone):
        resolution = 64

    other_hints = HINTS | {"color": {"blur": 0.5, "normalize": True}}
    others = {
        "resolution": describe(Larger(backbone.path), RECIPE, rows),
        "rows": describe(backbone, RECIPE, rows[1:]),
        "hints": describe(backbone, replace(RECIPE, hints=other_hints), rows),
        "hole": describe(backbone, replace(RECIPE, hole="dilate"), rows),
        "crop": describe(backbone, replace(RECIPE, crop="center"), rows),
        "seed": describe(backbone, replace(RECIPE, seed=9), rows),
        "vae": fitting | {"vae": "f00"},
        "schema": fitting | {"schema": 0},
    }
    for name, description in others.items():
        assert cache_key(description) != cache_key(fitting), name
        with pytest.raises(UserError, match=f"{cache.name} is stale or foreign.*{name} ") as refused:
            Latents(cache, description)
        assert "\n" not in str(refused.value)
    changed = [replace(rows[0], sha256="0" * 64), *rows[1:]]
    assert cache_key(describe(backbone, RECIPE, changed)) != cache_key(fitting), (
        "another image under the same name is another cache"
    )
    for name in ("mask_sha256", "relit_sha256"):
        changed = [replace(rows[0], extras=rows[0].extras | {name: "0" * 64}), *rows[1:]]
        assert cache_key(describe(backbone, RECIPE, changed)) != cache_key(fitting), name


@pytest.mark.parametrize("name", ["image", "mask", "relit"])
def test_a_file_that_is_not_the_manifests_is_named(backbone, manifest, tmp_path, name):
    """Guards the pixels: a wrong sha256, or a file that was replaced since, is one line and no cache."""
    row = read_manifest(manifest, "train")[1][0]
    change = {"sha256": "0" * 64} if name == "image" else {"extras": row.extras | {f"{name}_sha256": "0" * 64}}
    paths = {key: os.path.relpath(manifest.parent / getattr(row, key), tmp_path) for key in ("image", "mask")}
    extras = change.get("extras", row.extras)
    extras |= {"relit": os.path.relpath(manifest.parent / row.extras["relit"], tmp_path)}
    write_manifest(tmp_path / "manifest.jsonl", [replace(row, **paths | change | {"extras": extras})], "studio")
    with pytest.raises(UserError, match=r"is not the file of the manifest \(its sha256 differs\): run harmony.prepare"):
        built(tmp_path / "manifest.jsonl", "train", backbone, Recipe(), tmp_path / "cache", lambda line: None)
    assert not list(tmp_path.glob("cache/*/*"))


def test_a_missing_image_is_named(backbone, manifest, tmp_path, studio_rows):
    """Guards bad input: a picture that went away after preparation is one line with its path."""
    row = replace(studio_rows[0], image="gone.jpg")
    write_manifest(tmp_path / "manifest.jsonl", [row], "studio")
    with pytest.raises(UserError, match=r"gone\.jpg does not exist"):
        built(tmp_path / "manifest.jsonl", "train", backbone, Recipe(), tmp_path / "cache")
    with pytest.raises(UserError, match="no rows in split test"):
        built(tmp_path / "manifest.jsonl", "test", backbone, Recipe(), tmp_path / "cache")


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: os error 28")]
)
def test_a_full_disk_leaves_nothing_half_written(
    backbone, manifest, small_shards, tmp_path, monkeypatch, failure, cache
):
    """Guards the disk: one line, no partial file, finished shards kept, and the same command goes on."""
    original, calls = safetensors.torch.save_file, []

    def fill(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise failure
        original(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", fill)
    with pytest.raises(UserError, match="disk full: cannot write into .*/full/train-.*; free") as full:
        built(manifest, "train", backbone, RECIPE, tmp_path / "full", lambda line: None)
    assert "\n" not in str(full.value)
    folder = tmp_path / "full" / cache.name
    assert sorted(path.name for path in folder.iterdir()) == ["00000.json", "00000.safetensors"]
    monkeypatch.setattr(safetensors.torch, "save_file", original)
    built(manifest, "train", backbone, RECIPE, tmp_path / "full", lambda line: None)
    assert shards(folder) == shards(cache)


def build_slowly(manifest, backbone_folder, root):
    """In a process of its own: a shard every 0.2 s."""
    torch.set_num_threads(1)
    original = latents.write_shard

    def slow(path, tensors):
        digest = original(path, tensors)
        time.sleep(0.2)
        return digest

    latents.write_shard = slow
    built(manifest, "train", Backbone(backbone_folder), RECIPE, root, lambda line: None)


def test_a_killed_build_goes_on(backbone, manifest, small_shards, tmp_path, cache):
    """Guards SIGKILL: a real process dies in the middle of a build; completing it gives the same bytes."""
    root = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(target=build_slowly, args=(manifest, backbone.path, root))
    process.start()
    folder = root / cache.name
    while not (folder / "00000.safetensors").exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 0 < len(shards(folder)) < 4 and not (folder / "index.json").exists()
    built(manifest, "train", backbone, RECIPE, root, lambda line: None)
    assert shards(folder) == shards(cache)
    left = {path.name for path in folder.iterdir()}
    assert left == {path.name for path in cache.iterdir()}, "no partial file stays"


def test_copies_for_loader_processes_open_their_own_files(cache):
    """Guards pickling: a cache travels to loader processes without its open files and without its place changing."""
    import pickle

    data = Latents(cache)
    data[0]
    assert torch.equal(pickle.loads(pickle.dumps(data))[9]["moments"], data[9]["moments"])
    moved = cache.parent / "moved"
    shutil.copytree(cache, moved)
    assert torch.equal(Latents(moved)[9]["moments"], data[9]["moments"])
    assert json.loads((moved / "index.json").read_text())["sizes"] == dict(
        zip(shards(moved), (7, 7, 7, 3), strict=True)
    )


def test_hints_may_come_from_another_light(backbone, manifest, tmp_path):
    """Guards ``mismatch``: picture, mask and hole stay, the hint is that of the object under its second light, or of a
    photometric change where there is no second light.
    """
    rows = read_manifest(manifest, "train")[1]
    plain, other = (Recipe("jitter", "train", 1, HINTS, 3, mismatch) for mismatch in (0.0, 1.0))
    for row in rows[:4]:
        a, b = (example(row, manifest.parent, recipe, 32) for recipe in (plain, other))
        c = example(replace(row, extras={}), manifest.parent, other, 32)
        assert a.relit is None and np.array_equal(a.instance, a.image)
        for e in (b, c):
            assert (
                np.array_equal(e.image, a.image) and np.array_equal(e.hole, a.hole) and np.array_equal(e.mask, a.mask)
            )
            assert np.abs(e.instance.astype(int) - a.image)[a.mask].mean() > 2
        second = example(replace(row, image=row.extras["relit"]), manifest.parent, plain, 32)
        assert np.array_equal(b.instance, second.image) and not np.array_equal(c.instance, b.instance)
    folder = built(manifest, "train", backbone, other, tmp_path / "cache", lambda line: None)
    e = example(rows[1], manifest.parent, other, backbone.resolution)
    stored = Latents(folder)[1]["hint_color"]
    seen = hint("color", e.instance, e.mask, cell=backbone.factor, **HINTS["color"])
    assert np.array_equal((stored.numpy() * 255).round().astype(np.uint8), np.moveaxis(seen, -1, 0))


def test_pairs_bring_the_other_light(manifest):
    """Guards training on pairs: the hint shows the composite's object, but on a region elsewhere, where a composite is
    as the photograph, a random light; the composite's hash belongs to the cache's key.
    """
    render = read_manifest(manifest, "train")[1][0]
    hashes = {"composite": render.extras["relit"], "composite_sha256": "1" * 64}
    row, photograph = replace(render, extras=hashes), replace(render, extras={})
    recipe = Recipe("jitter", "train", 1, HINTS, 3, mismatch=1.0)
    own = example(row, manifest.parent, recipe, 32)
    assert np.array_equal(own.instance, example(render, manifest.parent, recipe, 32).instance)
    assert not np.array_equal(own.instance, example(photograph, manifest.parent, recipe, 32).instance)
    moved = replace(recipe, elsewhere=1.0)
    e, other = (example(r, manifest.parent, moved, 32) for r in (row, photograph))
    assert not np.array_equal(e.mask, own.mask) and np.array_equal(e.instance, other.instance)
    assert latents.row_hashes(row)[render.extras["relit"]] == "1" * 64


def test_a_region_elsewhere_takes_the_instances_place(small_manifest, tmp_path):
    """Guards ``elsewhere``: another mask on the same photograph, drawn anew for each variant, inside its hole."""
    manifest = small_manifest(tmp_path / "data")
    row = read_manifest(manifest, "train")[1][0]
    plain, moved = (Recipe("jitter", "train", 2, HINTS, elsewhere=share) for share in (0.0, 1.0))
    own, first, second = (example(row, manifest.parent, r, 32, v) for r, v in ((plain, 0), (moved, 0), (moved, 1)))
    assert first.mask.any() and not first.mask.all() and (first.hole | ~first.mask).all()
    assert not np.array_equal(first.mask, own.mask) and not np.array_equal(first.mask, second.mask)
    again = example(row, manifest.parent, moved, 32)
    assert np.array_equal(first.mask, again.mask) and np.array_equal(first.image, again.image)


@pytest.mark.parametrize("crop", ["center", "jitter"])
def test_squares_as_harmonize_cuts_them(small_manifest, tmp_path, crop):
    """Guards ``context``: a square of so many sides of the instance's box, which it holds whole; fixed for center."""
    manifest = small_manifest(tmp_path / "data")
    vary = []
    for row in read_manifest(manifest, "train")[1]:
        longer, shorter = max(row.box[2] - row.box[0], row.box[3] - row.box[1]), min(row.width, row.height)
        crops = [example(row, manifest.parent, Recipe(crop, context=1.6), 32, v).crop for v in range(6)]
        low, high = (1.6, 1.6) if crop == "center" else (0.75 * 1.6, 1.5 * 1.6)
        for c in crops:
            assert min(low * longer, shorter) - 1 <= c.side <= min(high * longer, shorter) + 1
            assert c.x0 <= row.box[0] and row.box[2] <= c.x0 + c.side
            assert c.y0 <= row.box[1] and row.box[3] <= c.y0 + c.side
        vary.append(len(set(crops)) > 1)
    assert any(vary) == (crop == "jitter")


def test_photographs_are_recolored(small_manifest, tmp_path):
    """Guards ``recolor``: another light for each variant, on the truth and on what its hints are made from alike; the
    light of an object goes on from there; renders, whose captions name their light, keep it; exemplars too.
    """
    manifest = small_manifest(tmp_path / "data")
    render = read_manifest(manifest, "train")[1][0]
    row = replace(render, extras={name: v for name, v in render.extras.items() if name != "relit"})
    plain, other = (Recipe("jitter", "train", 2, HINTS, recolor=share) for share in (0.0, 1.0))
    own, first, second = (example(row, manifest.parent, r, 32, v) for r, v in ((plain, 0), (other, 0), (other, 1)))
    assert np.array_equal(first.mask, own.mask) and not np.array_equal(first.image, own.image)
    assert np.array_equal(first.instance, first.image)
    assert not np.array_equal(first.image.mean((0, 1)).round(), second.image.mean((0, 1)).round())
    both = example(row, manifest.parent, replace(other, mismatch=1.0), 32)
    assert np.array_equal(both.image, first.image) and not np.array_equal(both.instance, both.image)
    renders = (example(render, manifest.parent, r, 32).image for r in (plain, other))
    assert np.array_equal(*renders)
    with pytest.raises(UserError, match="data.recolor is for ControlNets"):
        Recipe("jitter", hints={"exemplar": {}}, recolor=0.1)
    with pytest.raises(UserError, match="data.context is for ControlNets"):
        Recipe("extended", "shape", context=1.6)


def test_a_thin_object_stays_where_it_is(small_manifest, tmp_path):
    """Guards ``elsewhere``: what vanishes in its new square, smaller than the instance, does not end the cache."""
    folder = tmp_path / "data"
    manifest = small_manifest(folder)
    picture, mask = np.full((768, 1024, 3), 90, np.uint8), np.zeros((768, 1024), bool)
    mask[100:720, 500:512] = True
    write_image(folder / "pole.png", picture)
    write_image(folder / "pole_mask.png", mask)
    first = read_manifest(manifest, "train")[1][0]
    row = replace(
        first, image="pole.png", mask="pole_mask.png", box=(500, 100, 512, 720), width=1024, height=768, extras={}
    )
    masks = [example(row, folder, Recipe("jitter", elsewhere=1.0), 64, v).mask for v in range(60)]
    assert all(m.any() for m in masks)


def test_boxes_with_fractions():
    """Guards ``draw_jitter_crop``: boxes of annotations end between pixels, and small contexts leave no room."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        x, y = np.sort(rng.uniform(0, 80, 2)), np.sort(rng.uniform(0, 60, 2))
        box = x[0], y[0], min(80, x[1] + 0.5), min(60, y[1] + 0.5)
        crop = latents.draw_jitter_crop(box, 80, 60, rng, rng.choice([None, 1.0, 1.2, 1.6]))
        if crop.side <= 60:
            assert crop.x0 <= box[0] and box[2] <= crop.x0 + crop.side
            assert crop.y0 <= box[1] and box[3] <= crop.y0 + crop.side
