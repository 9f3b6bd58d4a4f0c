"""Squares of decoded pictures, and the mixture of renders and photographs in a batch."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harmony.data.manifest import read_manifest, write_manifest
from harmony.data.pixel_data import PixelData, PixelPool
from harmony.data.sources.pixels import read_rows
from harmony.pixels.images import read_image, write_image


@pytest.fixture(scope="module")
def pixels(small_manifest, tmp_path_factory):
    """PixelData over the renders and two train and two test 'photographs': other pictures in a folder of their own."""
    manifest = small_manifest(tmp_path_factory.mktemp("mixed"))
    rows = read_manifest(manifest)[1]
    for n, row in enumerate([r for r in rows if r.split == "train"][:2] + [r for r in rows if r.split == "test"][:2]):
        write_image(manifest.parent / f"photo{n}.png", read_image(manifest.parent / row.image)[:, :100])
        facts = {"width": 100, "box": tuple(min(v, 100) for v in row.box), "extras": {}}
        rows.append(replace(row, id=f"photo{n}", image=f"photo{n}.png", caption=f"photo {n}", **facts))
    write_manifest(manifest, rows, "mixed")
    data = PixelData(str(manifest), size=16, batch_size=10, photos=0.6, share=(0.35, 1.0))
    data.setup()
    data.trainer = SimpleNamespace(global_step=0, accumulate_grad_batches=1, global_rank=0, world_size=1)
    return data


def test_photographs_have_their_share_of_a_batch(pixels):
    """Guards the mixture: two photographs among twelve renders still make up 60 % of what is trained on."""
    flags = [bool(pixels.pools["train"].is_render(i)) for i in range(14)]
    assert flags.count(False) == 2
    sampler = pixels.train_dataloader().sampler
    drawn = torch.tensor([flags[i] for _, i in itertools.islice(sampler, 560)])
    assert abs(float((~drawn).float().mean()) - 0.6) < 0.06
    assert {i for _, i in itertools.islice(sampler, 560)} == set(range(14)), "each picture has its turn"
    batch = next(iter(pixels.train_dataloader()))
    assert batch["image"].shape == (10, 3, 16, 16) and batch["image"].abs().max() <= 1 and len(batch["caption"]) == 10


def test_a_batch_depends_on_its_position_alone(pixels, monkeypatch):
    """Guards exact resume and several processes: batch 3 of a run is that of a run which begins there, and the two
    halves of it are those of two processes.
    """

    def read(count, **facts):
        given = {"global_step": 0, "accumulate_grad_batches": 1, "global_rank": 0, "world_size": 1} | facts
        monkeypatch.setattr(pixels, "trainer", SimpleNamespace(**given))
        return list(itertools.islice(pixels.train_dataloader(), count))

    def same(a, b):
        return torch.equal(a["image"], b["image"]) and torch.equal(a["noise_seed"], b["noise_seed"])

    unbroken = read(4)
    assert same(unbroken[3], read(1, global_step=3)[0]) and not same(unbroken[3], unbroken[2])
    ranks = [read(2, global_rank=rank, world_size=2) for rank in range(2)]
    assert all(same(unbroken[2 * n + rank], ranks[rank][n]) for n in range(2) for rank in range(2))


def test_held_out_pictures_are_of_the_test_split(pixels):
    """Guards the backbone's measurements: test rows only, renders and photographs apart, captions distinct."""
    held = pixels.test_pictures()
    assert {kind: len(x) for kind, x in held.items()} == {"renders": 5, "photos": 2}
    images, captions = pixels.retrieval()
    assert len(images) == len(captions) == len(set(captions)) <= 5
    assert set(captions) <= {row.caption for row in pixels.pools["test"].rows}
    assert not set(captions) & pixels.captions()
    assert pixels.sample(40).shape == (40, 3, 16, 16), "more than there are"


def test_squares_without_share_are_the_deterministic_ones(small_manifest, tmp_path):
    """Guards measurement: the test pool gives the whole picture around the instance, the same every time."""
    manifest = small_manifest(tmp_path)
    pool = PixelPool(manifest, "test", 128)
    item = pool.read(2)
    assert torch.equal(item["image"], pool.read(2)["image"]) and item["render"] is True
    pixels = read_image(tmp_path / pool.rows[2].image)
    assert torch.equal(((item["image"] + 1) * 127.5).round().permute(1, 2, 0), torch.from_numpy(pixels).float())
    assert item["caption"] == pool.rows[2].caption


def test_photographs_are_cropped_at_random_and_renders_are_not(photos, small_manifest, tmp_path):
    """Guards augmentation: crops of a photograph have the wanted share of its side and stay inside it."""
    from harmony.data.manifest import write_manifest

    rows = read_rows(photos / "train", "train", tmp_path)
    write_manifest(tmp_path / "manifest.jsonl", rows, "photos")
    pool = PixelPool(tmp_path / "manifest.jsonl", "train", 8, share=(0.35, 0.9), seed=1)
    height, width = pool.pictures[0].shape[:2]
    crops = [pool.crop(0, np.random.default_rng(n)) for n in range(50)]
    low, high = 0.35 * min(width, height), 0.9 * min(width, height)
    assert all(low - 1 <= c.side <= high and c.clip(width, height)[2] - c.x0 == c.side for c in crops)
    assert len({(c.x0, c.y0, c.side) for c in crops}) > 40
    render = PixelPool(small_manifest(tmp_path / "renders"), "train", 64, share=(0.35, 0.9))
    assert {render.crop(0, np.random.default_rng(n)).side for n in range(5)} == {128}
    flipped = {render[position, 0]["image"].numpy().tobytes() for position in range(20)}
    assert len(flipped) == 2, "a render is only mirrored"
