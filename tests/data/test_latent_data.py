"""Cached latents as batches: randomness by seed and position alone, loaders that go on where a run stopped."""

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harmony.data.latent_data import Draws
from harmony.data.manifest import read_manifest, write_manifest
from harmony.data.stream import Stream


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
    reseeded = Draws(draws.latents, draws.tokens, seed=1)[17, 3]
    assert not torch.equal(reseeded["noise"], first["noise"])
    noise = torch.stack([draws[p, 0]["noise"] for p in range(60)])
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03
    assert len({float(draws[p, 0]["time"]) for p in range(60)}) == 60


def test_items_carry_their_caption_and_the_hint_of_their_branch(data, latent_data):
    """Guards the join of cache and manifest, and that only the branch's own hint travels."""
    rows = read_manifest(data.manifest, "train")[1]
    for i in (0, 5, 23):
        item = data.sets["train"][0, i]
        assert torch.equal(item["tokens"], data.backbone.tokens([rows[i // 2].caption])[0])
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
    """Guards the shapes of a batch and the start offset of the loader, gradient accumulation included."""
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
    assert data.recipes["validation"].crop == "center" and data.recipes["validation"].hole == "dilate"


def test_examples_are_held_out_rows(data):
    """Guards ``examples``: the test split at the backbone's resolution, the latent hole by nearest."""
    batch = data.examples(3)
    rows = read_manifest(data.manifest, "test")[1]
    assert batch["image"].shape == (3, 3, 32, 32) and batch["image"].abs().max() <= 1
    assert torch.equal(batch["hole"], batch["pixel_hole"][:, :, ::4, ::4])
    assert torch.equal(batch["tokens"], data.backbone.tokens([row.caption for row in rows[:3]]))


def test_photographs_have_their_share(latent_data):
    """Guards ``photos``: in batches, whatever there are more of; the same item at the same position; one kind alone."""
    data = latent_data(batch_size=2, photos=0.75)
    original = data.manifest.read_text()
    rows = read_manifest(data.manifest, "train")[1]
    assert np.allclose(data.shares, 1 / len(data.shares)), "renders alone"
    try:
        photograph = replace(rows[0], extras={name: v for name, v in rows[0].extras.items() if name != "source"})
        write_manifest(data.manifest, [photograph, *rows[1:]], "studio")
        shares = data.shares
        photographs = np.arange(len(shares)) < data.recipes["train"].variants
        assert shares[photographs].sum() == pytest.approx(0.75) and shares.sum() == pytest.approx(1)
        assert len(rows) > 4 and len(set(shares)) == 2
        items = [i for _, i in islice(Stream(len(shares), 2, shares=shares), 400)]
        assert abs(np.mean(photographs[items]) - 0.75) < 0.07
        assert items == [i for _, i in islice(Stream(len(shares), 2, shares=shares), 400)]
    finally:
        data.manifest.write_text(original)
