"""Every process and every resumed run sees the samples of one unbroken process, with the same randomness."""

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from harmony.data.datamodule import Draws, PixelData, Stream
from harmony.data.manifest import read_manifest, write_manifest
from harmony.images import read_image, write_image


def take(stream: Stream, count: int) -> list[tuple[int, int]]:
    return list(islice(stream, count))


def test_each_pass_is_a_permutation_of_its_own():
    """Guards the shuffle: every item once a pass, another order each pass and each seed."""
    pairs = take(Stream(10, 4, seed=1), 40)
    assert [p for p, _ in pairs] == list(range(40))
    passes = [[i for _, i in pairs[start : start + 10]] for start in range(0, 40, 10)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4
    assert passes[0] != [i for _, i in take(Stream(10, 4, seed=2), 10)]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_global_batches_of_one_process(world):
    """Guards DDP: the ranks together see what one process with the whole batch sees, batch by batch."""
    batch = 6 // world
    one = take(Stream(7, 6, seed=5), 60)
    ranks = [take(Stream(7, batch, seed=5, rank=r, world=world), 10 * batch) for r in range(world)]
    for n in range(10):
        assert [pair for rank in ranks for pair in rank[n * batch : (n + 1) * batch]] == one[n * 6 : (n + 1) * 6]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_stream_goes_on(rank):
    """Guards exact resume: starting at global batch n gives what the unbroken stream gives from there on."""
    whole = take(Stream(10, 4, 3, rank, 2), 60)
    assert take(Stream(10, 4, 3, rank, 2, start=7), 32) == whole[28:]


@pytest.fixture(scope="module")
def data(latent_data):
    data = latent_data()
    data.setup()
    return data


def test_draws_depend_on_seed_and_position_alone(data):
    """Guards randomness: no hidden state, no dependence on what was asked before or on the process that asks."""
    draws = data.sets["train"]
    names = ("noise", "encode", "encode_masked", "time", "drop")
    first, other, again = draws[17, 3], draws[18, 3], draws[17, 3]
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in names)
    elsewhere = draws[17, 4]
    assert all(torch.equal(first[n], elsewhere[n]) for n in names) and not torch.equal(
        first["hint_color"], elsewhere["hint_color"]
    )
    reseeded = Draws(draws.latents, draws.tokens, ["color"], seed=1)[17, 3]
    assert not torch.equal(reseeded["noise"], first["noise"])
    noise = torch.stack([draws[p, 0]["noise"] for p in range(60)])
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03
    assert len({float(draws[p, 0]["time"]) for p in range(60)}) == 60


def test_items_carry_their_caption_and_the_hint_of_their_branch(data, latent_data):
    """Guards the join of cache and manifest, and that only the branch's own hint travels."""
    rows = read_manifest(data.manifest, "train")[1]
    for i in (0, 5, 23):
        item = data.sets["train"][0, i]
        assert torch.equal(item["tokens"], data.kit.tokens([rows[i // 2].caption])[0])
        assert torch.equal(item["hint_color"], data.sets["train"].latents[i]["hint_color"])
        assert {name for name in item if name.startswith("hint")} == {"hint_color"}
    structure, plain = latent_data(branch="structure"), latent_data(branch=None)
    structure.setup(), plain.setup()
    edges = structure.sets["train"][0, 0]["hint_structure"]
    assert set(edges.unique().tolist()) <= {0.0, 1.0} and edges.any()
    assert not any(name.startswith("hint") for name in plain.sets["train"][0, 0])


def trainer(step: int, accumulate: int = 1) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, accumulate_grad_batches=accumulate, global_rank=0, world_size=1)


def test_batches_have_the_promised_shapes_and_go_on(latent_data):
    """Guards the Batch contract of sample.py and the start offset of the loader, gradient accumulation included."""
    data = latent_data(batch_size=3)
    data.setup()
    data.trainer = trainer(0)
    batches = list(islice(data.train_dataloader(), 4))
    shapes = {name: tuple(value.shape) for name, value in batches[0].items()}
    assert shapes["moments"] == shapes["masked_moments"] == (3, 8, 8, 8) and shapes["noise"] == (3, 4, 8, 8)
    assert shapes["hole"] == shapes["weight"] == (3, 1, 8, 8) and shapes["hint_color"] == (3, 3, 32, 32)
    assert shapes["tokens"] == (3, 16) and shapes["index"] == shapes["time"] == shapes["drop"] == (3,)
    data.trainer = trainer(1, accumulate=2)
    assert torch.equal(next(iter(data.train_dataloader()))["noise"], batches[2]["noise"])
    data.workers = 2
    data.trainer = trainer(0)
    for ours, theirs in zip(islice(data.train_dataloader(), 2), batches, strict=False):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), "loader processes change nothing"


def test_validation_is_the_same_every_time(data):
    """Guards comparable validation losses: all items, in order, with fixed noise and timesteps."""
    first, second = (list(data.val_dataloader()) for _ in range(2))
    assert torch.cat([b["index"] for b in first]).tolist() == [0, 1, 2, 3]
    assert all(
        torch.equal(a["noise"], b["noise"]) and torch.equal(a["time"], b["time"])
        for a, b in zip(first, second, strict=True)
    )
    assert data.recipes["validation"].crop == "centre" and data.recipes["validation"].hole == "dilate"


def test_examples_are_held_out_rows(data):
    """Guards ``examples``: the test split at the kit's resolution, the latent hole by nearest."""
    batch = data.examples(3)
    rows = read_manifest(data.manifest, "test")[1]
    assert batch["image"].shape == (3, 3, 32, 32) and batch["image"].abs().max() <= 1
    assert torch.equal(batch["hole"], batch["pixel_hole"][:, :, ::4, ::4])
    assert torch.equal(batch["tokens"], data.kit.tokens([row.caption for row in rows[:3]]))


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
    return data


def test_photographs_have_their_share_of_a_batch(pixels):
    """Guards the mixture: two photographs among twelve renders still make up 60 % of what is trained on."""
    flags = [bool(pixels.pools["train"].is_render(i)) for i in range(14)]
    assert flags.count(False) == 2
    drawn = torch.tensor([flags[i] for _ in range(40) for i in pixels.train_dataloader().sampler])
    assert abs(float((~drawn).float().mean()) - 0.6) < 0.06
    batch = next(iter(pixels.train_dataloader()))
    assert batch["image"].shape == (10, 3, 16, 16) and batch["image"].abs().max() <= 1 and len(batch["caption"]) == 10


def test_held_out_pictures_are_of_the_test_split(pixels):
    """Guards the kit's measurements: test rows only, renders and photographs apart, captions distinct."""
    held = pixels.held_out()
    assert {kind: len(x) for kind, x in held.items()} == {"renders": 5, "photos": 2}
    images, captions = pixels.retrieval()
    assert len(images) == len(captions) == len(set(captions)) <= 5
    assert set(captions) <= {row.caption for row in pixels.pools["test"].rows}
    assert not set(captions) & pixels.captions()
    assert pixels.sample(40).shape == (40, 3, 16, 16), "more than there are"
