"""Every process and every resumed run sees the samples of one unbroken process, with the same randomness."""

import json
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from harmony.core.errors import UserError
from harmony.data.manifest import read_manifest, write_manifest
from harmony.data.modules import Draws, PicturesData, PixelData, Stream, Views
from harmony.models.backbone import Kit
from harmony.pixels.images import read_image, resize, to_model, write_image


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


# --- the few pictures of a concept

WIDE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)  # the kit's resolution is 32
TALL = np.random.default_rng(1).integers(0, 256, (50, 32, 3), np.uint8)


@pytest.fixture
def concept(tmp_path):
    """A folder with three pictures; ``2.png`` is ``0.png``, lying on its side as EXIF says."""
    write_image(tmp_path / "0.png", WIDE)
    write_image(tmp_path / "1.png", TALL)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(np.rot90(WIDE)).save(tmp_path / "2.png", exif=exif)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.fixture
def pictures(concept, random_kit):
    """``pictures(**options)``: the data of that folder."""
    return lambda **options: PicturesData(str(concept), Kit(str(random_kit)), **options)


def test_pictures_are_squares_and_upright(pictures):
    """Guards what is learnt from: the central square or the whole, squashed; EXIF orientation applied; by name."""
    data = pictures()
    assert [file.name for file in data.files] == ["0.png", "1.png", "2.png"]
    middles = [WIDE[:, 8:40], TALL[9:41], WIDE[:, 8:40]]
    assert all(np.array_equal(*pair) for pair in zip(data.pictures, middles, strict=True))
    wholes = [resize(image, 32, 32) for image in (WIDE, TALL, WIDE)]
    squashed = pictures(center_crop=False).pictures
    assert all(np.array_equal(*pair) for pair in zip(squashed, wholes, strict=True))
    assert abs(squashed[0][:, 0].astype(float) - WIDE[:, 0]).mean() < 40 < abs(squashed[0] - 1.0 * middles[0]).mean()


def test_views_are_the_pictures_and_their_mirror_images(pictures, random_kit):
    """Guards the encoding: a view is the kit's own moments of a picture, or of its mirror image half of the time."""
    data, kit = pictures(), Kit(str(random_kit))
    data.setup()
    draws = [data.views[position, 1]["moments"] for position in range(100)]
    straight, mirrored = kit.moments(to_model(np.stack([data.pictures[1], data.pictures[1][:, ::-1]])))
    both = [[torch.allclose(moments, way, atol=1e-5) for moments in draws] for way in (straight, mirrored)]
    assert sum(both[0]) + sum(both[1]) == 100 and 35 <= sum(both[1]) <= 65
    assert len(data.views) == 3 and data.views[0, 2]["picture"] == 2


def test_views_depend_on_seed_and_position_alone(pictures):
    """Guards randomness: what a step draws does not depend on the picture, on what was asked before, or on others."""
    data = pictures()
    data.setup()
    views, names = data.views, ("noise", "encode", "time", "template")
    first, again, other, reseeded = views[17, 1], views[17, 1], views[18, 1], Views(views.moments, 1)[17, 1]
    assert all(torch.equal(first[name], again[name]) for name in (*names, "moments"))
    assert all(torch.equal(first[name], views[17, 0][name]) for name in names)
    for name in names:
        assert not torch.equal(first[name], other[name]) and not torch.equal(first[name], reseeded[name])
    assert not torch.equal(first["noise"], first["encode"])
    for name in ("time", "template"):
        drawn = torch.stack([views[position, 0][name] for position in range(60)])
        assert len(drawn.unique()) == 60 and 0 <= drawn.min() < 0.2 and 0.8 < drawn.max() < 1
    noise = torch.stack([views[position, 0]["noise"] for position in range(60)])
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03


def test_pictures_are_seen_in_one_order_whatever_the_batch(pictures):
    """Guards the stream: batches of two and of three hold the same samples in the same order; a resumed run, with
    gradient accumulation too, goes on where it was; every picture has its turn.
    """

    def seen(size: int, count: int, step: int = 0, accumulate: int = 1) -> dict[str, torch.Tensor]:
        data = pictures(batch_size=size, seed=3)
        data.setup()
        data.trainer = trainer(step, accumulate)
        batches = list(islice(data.train_dataloader(), count))
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    two, three, resumed = seen(2, 6), seen(3, 4), seen(2, 2, step=2, accumulate=2)
    assert two["moments"].shape == (12, 8, 8, 8) and two["noise"].shape == two["encode"].shape == (12, 4, 8, 8)
    for name, values in two.items():
        assert torch.equal(values, three[name]) and torch.equal(values[8:], resumed[name]), name
    assert [sorted(two["picture"][n : n + 3].tolist()) for n in range(0, 12, 3)] == [[0, 1, 2]] * 4


def test_captions_say_where_the_word_belongs(pictures, concept):
    """Guards captions.json: by name with or without suffix, none for the others; refused without a place for it."""
    assert pictures().captions == [None] * 3
    file = concept / "captions.json"
    file.write_text(json.dumps({"0": "a {} on grass", "1.png": "one {}", "elsewhere": "of no picture"}))
    assert pictures().captions == ["a {} on grass", "one {}", None]
    file.write_text(json.dumps({"0": "a {} on grass", "2": "a mug on grass"}))
    with pytest.raises(UserError, match="captions.json: 'a mug on grass' has no {}"):
        pictures().captions  # noqa: B018
    file.write_text("{")
    with pytest.raises(UserError, match="captions.json: expected"):
        pictures().captions  # noqa: B018


def test_folders_without_pictures_are_refused(concept, random_kit):
    """Guards bad input: nothing there, no pictures in it, one that is none."""
    (concept / "empty").mkdir()
    (concept / "empty" / "captions.json").write_text("{}")
    for name, message in (("missing", "missing: no such folder"), ("empty", "empty: no pictures")):
        with pytest.raises(UserError, match=message):
            PicturesData(str(concept / name), Kit(str(random_kit))).setup()
    (concept / "empty" / "torn.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(UserError, match="torn.jpg cannot be decoded"):
        PicturesData(str(concept / "empty"), Kit(str(random_kit))).setup()


def test_pictures_are_known_by_their_content(pictures, concept):
    """Guards resume and provenance: the hashes name each picture and follow its bytes; previews are one batch."""
    before = pictures().hashes()
    assert list(before) == ["0.png", "1.png", "2.png"] and len(set(before.values())) == 3
    write_image(concept / "1.png", WIDE)
    now = pictures().hashes()
    assert now["1.png"] == now["0.png"] == before["0.png"] != before["1.png"] and now["2.png"] == before["2.png"]
    assert [batch.tolist() for batch in pictures(previews=5).val_dataloader()] == [[0, 1, 2, 3, 4]]
