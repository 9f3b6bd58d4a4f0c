"""How far a background has moved: known shifts of real pictures, found beside other light, noise and a new object."""

import math
from pathlib import Path

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
        assert shift(output, original, hole) == pytest.approx(math.hypot(dy, dx), abs=0.1)


def test_what_cannot_be_told_is_nan():
    """Guards against a number for a background without anything to align; the same pixels have moved by nothing."""
    picture, hole = read_image(PICTURES[0]), np.zeros((128, 128), bool)
    hole[:120] = True
    flat = np.full_like(picture, 100)
    assert math.isnan(shift(flat, flat, ~hole)) and shift(picture, picture, np.zeros_like(hole)) == 0
    hole[:127] = True
    assert math.isnan(shift(picture, picture, hole))
