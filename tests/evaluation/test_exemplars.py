"""The bench for painting by example: who is whose exemplar, and figures that can be worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from harmony.core.errors import UserError
from harmony.evaluation.eval_sets import EvalSet
from harmony.evaluation.exemplars import Likeness, Quality, copying, pair_exemplars
from harmony.methods.method import Composite


class MeanColour:
    """Stands for a CLIP tower: the mean color of a picture, centered."""

    size, protocol, name = 16, "mean-colour", "mean-colour"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) / 127.5 - 1

    def images(self, images: list[np.ndarray]) -> torch.Tensor:
        return torch.stack([torch.from_numpy(x).float().mean((0, 1)) for x in images]) / 127.5 - 1


def pictures(colours: list[tuple]) -> EvalSet:
    """Grey pictures of 32 px with one colored object each."""
    mask = np.zeros((32, 32), bool)
    mask[8:24, 6:20] = True
    mask[8, 6] = False
    images = [np.where(mask[..., None], np.uint8(colour), np.uint8(128)) for colour in colours]
    return EvalSet("test", [Composite(x, x, mask, mask, "x") for x in images], images)


COLOURS = [(255, 0, 0), (230, 20, 20), (0, 0, 255), (0, 230, 0), (250, 5, 5)]
LABELS = ["cup", "cup", "cup", "tree", "duck"]
CROPS = [np.full((8, 6, 3), colour, np.uint8) for colour in COLOURS]


def paired(colours: slice = slice(None), limit=None, objects="abcde", say=lambda line: None, items=None) -> EvalSet:
    whole = items or pictures(COLOURS[colours])
    return pair_exemplars(
        whole, CROPS[colours], LABELS[colours], list(objects)[colours], MeanColour(), limit=limit, say=say
    )


def test_the_exemplar_is_the_most_similar_other_object_of_the_kind():
    """Guards the choice: never itself, never the same object in another picture, never another kind however alike;
    without a second of its kind it is left out, and that is said; the hole is the box.
    """
    said = []
    made = paired(say=said.append)
    assert len(made) == 3 and "of 5 pictures 2 have no other of their kind, 0 a box above" in said[0]
    shown = [c.exemplar[0, 0].tolist() for c in made.composites]
    assert shown[:2] == [[230, 20, 20], [255, 0, 0]] and shown[2] in ([230, 20, 20], [255, 0, 0])
    assert all(c.hole.sum() == 16 * 14 and c.hole[8, 6] for c in made.composites)
    assert len(paired(limit=2)) == 2
    assert paired(objects="aabcd").composites[0].exemplar[0, 0].tolist() == [0, 0, 255]
    with pytest.raises(UserError, match="of 3 pictures 3 show a kind of object that no other one shows"):
        paired(slice(2, None))


def test_boxes_above_half_of_the_picture_are_left_out():
    """Guards the rule of COCOEE: there must be something around the box to fit into."""
    large, said = pictures(COLOURS), []
    large.composites[0] = replace(large.composites[0], mask=np.pad(np.ones((28, 30), bool), ((2, 2), (1, 1))))
    made = paired(items=large, say=said.append)
    assert len(made) == 2 and "1 a box above half" in said[0]


def test_copying_is_the_correlation_of_pixels():
    """Guards the measure: 1 for a copy and for one under other light, about 0 for noise, -1 for the negative."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert copying(a, a) == pytest.approx(1) and copying(a // 2 + 30, a) > 0.99
    assert copying(255 - a, a) == pytest.approx(-1) and abs(copying(a, b)) < 0.1
    assert copying(np.full_like(a, 7), a) == 0


def test_figures_of_a_perfect_copy():
    """Guards the figures: pasting the exemplar into the box gives a cosine of 100 and full correlation, nothing else
    changes; what the source shows is less alike.
    """
    made = paired()
    noise = np.random.default_rng(1)
    shown = noise.integers(0, 256, (3, 16, 14, 3), dtype=np.uint8)
    made = replace(made, composites=[replace(c, exemplar=e) for c, e in zip(made.composites, shown, strict=True)])
    copies = []
    for c in made.composites:
        y = c.background.copy()
        y[8:24, 6:20] = c.exemplar
        copies.append(y)
    real = list(noise.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8))
    likeness = Likeness(made, MeanColour(), MeanColour(), real)
    copied, source = (likeness.measure(y).means for y in (copies, made.backgrounds))
    assert copied["test/pasted/clip_i"] == pytest.approx(100, abs=0.1)
    assert copied["test/pasted/clip_i"] > source["test/pasted/clip_i"] + 1
    assert copied["test/pasted/copying"] == pytest.approx(1) and abs(source["test/pasted/copying"]) < 0.1
    assert copied["test/pasted/bg_drift"] == copied["test/raw/bg_drift"] == 0
    assert (
        copied["test/pasted/fid"] > 0
        and copied["test/pasted/clip_fid"] > 0
        and 0 <= copied["test/pasted/qs_own"] <= 100
    )


def test_quality_is_a_rank_among_real_pictures():
    """Guards qs_own: about 50 for the set itself, about 0 for what lies far away, and the same every time."""
    rng = torch.Generator().manual_seed(0)
    real, more = torch.randn(400, 4, generator=rng), torch.randn(200, 4, generator=rng)
    quality = Quality(real)
    assert 40 < quality(more).mean() < 60 and quality(more + 8).mean() < 1
    assert np.array_equal(Quality(real)(more), quality(more))
