"""The few pictures of one thing: squares, their latent views, captions and hashes."""

import json
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from harmony.core.errors import UserError
from harmony.data.picture_data import PicturesData, Views
from harmony.models.backbone import Backbone
from harmony.pixels.images import resize, to_model, write_image

WIDE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)  # the backbone's resolution is 32
TALL = np.random.default_rng(1).integers(0, 256, (50, 32, 3), np.uint8)


def trainer(step: int, accumulate: int = 1) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, accumulate_grad_batches=accumulate, global_rank=0, world_size=1)


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
def pictures(concept, random_backbone):
    """``pictures(**options)``: the data of that folder."""
    return lambda **options: PicturesData(str(concept), Backbone(str(random_backbone)), **options)


def test_pictures_are_squares_and_upright(pictures):
    """Guards what is learned from: the central square or the whole, squashed; EXIF orientation applied; by name."""
    data = pictures()
    assert [file.name for file in data.files] == ["0.png", "1.png", "2.png"]
    middles = [WIDE[:, 8:40], TALL[9:41], WIDE[:, 8:40]]
    assert all(np.array_equal(*pair) for pair in zip(data.pictures, middles, strict=True))
    wholes = [resize(image, 32, 32) for image in (WIDE, TALL, WIDE)]
    squashed = pictures(center_crop=False).pictures
    assert all(np.array_equal(*pair) for pair in zip(squashed, wholes, strict=True))
    assert abs(squashed[0][:, 0].astype(float) - WIDE[:, 0]).mean() < 40 < abs(squashed[0] - 1.0 * middles[0]).mean()


def test_views_are_the_pictures_and_their_mirror_images(pictures, random_backbone):
    """Guards the encoding: a view is the backbone's own moments of a picture, or of its mirror image half of the
    time.
    """
    data, backbone = pictures(), Backbone(str(random_backbone))
    data.setup()
    draws = [data.views[position, 1]["moments"] for position in range(100)]
    straight, mirrored = backbone.moments(to_model(np.stack([data.pictures[1], data.pictures[1][:, ::-1]])))
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


def test_captions_say_where_the_word_belongs(pictures, concept, capsys):
    """Guards captions.json: by name with or without suffix, none for the others; refused without a place for it."""
    assert pictures().captions == [None] * 3
    file = concept / "captions.json"
    file.write_text(json.dumps({"0": "a {} on grass", "1.png": "one {}", "elsewhere": "of no picture"}))
    assert pictures().captions == ["a {} on grass", "one {}", None]
    assert "captions without a text or a picture: 1 left out: elsewhere\n" in capsys.readouterr().out
    file.write_text(json.dumps({"0": "a {} on grass", "2": "a mug on grass"}))
    with pytest.raises(UserError, match="captions.json: 'a mug on grass' has no {}"):
        pictures().captions  # noqa: B018
    file.write_text("{")
    with pytest.raises(UserError, match="captions.json cannot be read as JSON"):
        pictures().captions  # noqa: B018


def test_folders_without_pictures_are_refused(concept, random_backbone):
    """Guards bad input: nothing there, no pictures in it, one that is none."""
    (concept / "empty").mkdir()
    (concept / "empty" / "captions.json").write_text("{}")
    for name, message in (("missing", "missing: no such folder"), ("empty", "empty: no pictures")):
        with pytest.raises(UserError, match=message):
            PicturesData(str(concept / name), Backbone(str(random_backbone))).setup()
    (concept / "empty" / "torn.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(UserError, match="torn.jpg cannot be decoded"):
        PicturesData(str(concept / "empty"), Backbone(str(random_backbone))).setup()


def test_pictures_are_known_by_their_content(pictures, concept):
    """Guards resume and provenance: the hashes name each picture and follow its bytes; previews are one batch."""
    before = pictures().hashes()
    assert list(before) == ["0.png", "1.png", "2.png"] and len(set(before.values())) == 3
    write_image(concept / "1.png", WIDE)
    now = pictures().hashes()
    assert now["1.png"] == now["0.png"] == before["0.png"] != before["1.png"] and now["2.png"] == before["2.png"]
    assert [batch.tolist() for batch in pictures(previews=5).val_dataloader()] == [[0, 1, 2, 3, 4]]
