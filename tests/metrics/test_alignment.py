"""How far a background has moved: known shifts of real pictures, found beside other light, noise and a new object."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.ndimage import shift as move

from harmony.metrics.alignment import shift
from harmony.pixels.images import read_image

PICTURES = sorted((Path(__file__).resolve().parents[2] / "datasets" / "studio" / "test" / "data").iterdir())[:3]


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
@pytest.mark.parametrize("dy, dx", [(0, 0), (0.4, -0.3), (1.5, 2.25), (-7, 4)])
def test_a_known_shift_is_found(path, dy, dx):
    """Guards fractions of a pixel, and that the object, which stands still or is new, has no say."""
    original, rng = read_image(path), np.random.default_rng(0)
    hole = np.zeros(original.shape[:2], bool)
    hole[40:90, 40:90] = True
    output = np.stack([move(original[..., c].astype(float), (dy, dx), order=3, mode="reflect") for c in range(3)], -1)
    output = np.clip(0.9 * output + 10 + rng.normal(0, 2, output.shape), 0, 255).astype(np.uint8)
    for inside in (original[hole], rng.integers(0, 256, (hole.sum(), 3))):
        output[hole] = inside
        assert shift(output, original, hole) == pytest.approx(math.hypot(dy, dx), abs=0.15)


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_zoom_is_a_shift_too(path):
    """Guards what editors do that keep the center: the mean distance over the background."""
    original, hole = read_image(path), np.zeros((128, 128), bool)
    hole[40:90, 40:90] = True
    warp = np.float32([[1.03, 0, -0.03 * 63.5], [0, 1.03, -0.03 * 63.5]])
    output = cv2.warpAffine(original, warp, (128, 128), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    y, x = np.nonzero(~hole)
    assert shift(output, original, hole) == pytest.approx(
        np.hypot(0.03 * (x - 63.5), 0.03 * (y - 63.5)).mean(), abs=0.1
    )


def test_another_background_has_not_moved():
    """Guards means over pictures: a background that is drawn anew gives no number, however well it could be aligned."""
    hole = np.zeros((128, 128), bool)
    hole[40:90, 40:90] = True
    pictures = [read_image(path) for path in PICTURES]
    for picture in pictures:
        assert math.isnan(shift(np.ascontiguousarray(picture[:, ::-1]), picture, hole))
        assert all(math.isnan(shift(other, picture, hole)) for other in pictures if other is not picture)


def test_what_cannot_be_told_is_nan():
    """Guards against a number for a background without anything to align; the same pixels have moved by nothing."""
    picture, hole = read_image(PICTURES[0]), np.zeros((128, 128), bool)
    hole[:120] = True
    flat = np.full_like(picture, 100)
    assert math.isnan(shift(flat, flat, ~hole)) and shift(picture, picture, np.zeros_like(hole)) == 0
    hole[:127] = True
    assert math.isnan(shift(picture, picture, hole))
