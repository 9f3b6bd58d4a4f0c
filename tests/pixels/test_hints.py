"""Condition operators: where they are zero, what they keep, what they refuse."""

import cv2
import numpy as np
import pytest
import torch

from harmony.core.errors import UserError
from harmony.pixels import hints, images, masks


def disc(side=128, radius=40):
    y, x = np.mgrid[0:side, 0:side] - side // 2
    return x**2 + y**2 <= radius**2


def noise(side=128):
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def checks(side=128, cell=8):
    y, x = np.mgrid[0:side, 0:side] // cell
    return np.repeat(((x + y) % 2 * 200 + 20).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("branch", sorted(hints.HINTS))
def test_hints_are_eight_bit_and_zero_outside(branch):
    result = hints.hint(branch, noise(), disc())
    assert result.shape == (128, 128, 3) and result.dtype == np.uint8 and result.any()
    reach = cv2.dilate(disc().astype(np.uint8), np.ones((3, 3))) > 0 if branch == "structure" else disc()
    assert not result[~reach].any()
    assert hints.check_hint(images.to_hint(result)) is not None


def test_masked_image_and_instance_recombine():
    """x_m is 0 (mid-grey) inside the hole and x outside; F is 0 outside M; together they are x again."""
    x, mask = noise(), disc()
    masked = images.to_model(x) * ~torch.from_numpy(mask)
    instance = hints.instance_on_black(x, mask)
    assert (masked[:, mask] == 0).all() and torch.equal(masked[:, ~mask], images.to_model(x)[:, ~mask])
    assert not instance[~mask].any()
    recombined = np.where(mask[..., None], instance, images.from_model(masked))
    assert np.array_equal(recombined, x)


# --- color


@pytest.mark.parametrize("blur", [0.5, 1.25, 4])
def test_normalised_blur_keeps_a_constant_colour_up_to_the_rim(blur):
    colour = np.array([200, 30, 90], np.uint8)
    image = np.where(disc()[..., None], colour, np.array([0, 255, 0], np.uint8))
    assert (hints.blur_hint(image, disc(), blur)[disc()] == colour).all()


def test_plain_blur_darkens_the_rim():
    image, rim = np.full((128, 128, 3), 200, np.uint8), disc() & ~disc(radius=38)
    assert hints.blur_hint(image, disc(), normalize=False)[rim].mean() < 150


@pytest.mark.parametrize(("side", "cell", "sigma"), [(512, 8, 10), (64, 4, 5)])
def test_blur_is_given_in_latent_cells(side, cell, sigma):
    """1.25 cells are 10 pixels at 512 on Stable Diffusion, as in Liu 2025, and 5 at 64 on the tiny backbone."""
    image = np.zeros((side, side, 3), np.uint8)
    image[:, : side // 2] = 255
    row = hints.hint("color", image, np.ones((side, side), bool), cell=cell)[side // 2, :, 0] / 255
    spread = (row > 0.16).sum() - (row > 0.84).sum()
    assert abs(spread - 2 * sigma) <= 1.5
    assert (row[: side // 2 - 3 * sigma - 1] == 1).all()  # no tap reaches farther


def test_blur_removes_high_frequencies():
    x, mask = noise(), disc()

    def energy(image):
        return np.abs(np.diff(image.astype(float), axis=0))[disc(radius=38)[1:]].mean()

    assert energy(hints.blur_hint(x, mask)) < 0.1 * energy(x)


# --- structure


def test_edges_are_binary_with_equal_channels():
    edges = hints.edge_hint(checks(), disc())
    assert set(np.unique(edges)) == {0, 255} and (edges == edges[..., :1]).all()


def test_edge_sources():
    flat = np.full((128, 128, 3), 150, np.uint8)
    assert not hints.edge_hint(flat, disc(), edge_source="full_times_mask").any()
    silhouette = hints.edge_hint(flat, disc())[..., 0] > 0
    rim = masks.dilate(disc(), 2) & ~disc(radius=37)
    assert silhouette.sum() > 200 and not silhouette[~rim].any()
    inner = hints.edge_hint(checks(), disc(), edge_source="full_times_mask")
    assert inner.any() and not inner[~disc()].any()
    with pytest.raises(UserError, match="edge_source"):
        hints.edge_hint(flat, disc(), edge_source="half")


def test_thresholds_act():
    faint = (checks() // 8 + 100).astype(np.uint8)
    assert not hints.edge_hint(faint, disc(), edge_source="full_times_mask").any()
    assert hints.edge_hint(faint, disc(), low=20, high=40, edge_source="full_times_mask").any()


# --- refusals


def test_unknown_branch_is_named():
    with pytest.raises(UserError, match="'colour'.*color, structure, raw"):
        hints.hint("colour", noise(), disc())


@pytest.mark.parametrize("spoil", [lambda h: h * 2 - 1, lambda h: h * 255, lambda h: h * float("nan")])
def test_a_hint_in_another_range_is_refused(spoil):
    with pytest.raises(UserError, match=r"\[0, 1\]"):
        hints.check_hint(spoil(images.to_hint(noise())))


def test_a_hint_with_its_surroundings():
    """Guards what a harmonizing net compares: the blurred object, a black rim, the photograph around the hole."""
    image, background, mask = noise(), noise()[::-1].copy(), disc()
    hole = np.roll(mask, 3, axis=0) | mask | np.roll(mask, -3, axis=0)
    result = hints.hint("color", image, mask, background, hole, surroundings=True, blur=2.5)
    assert np.array_equal(result[mask], hints.blur_hint(image, mask, blur=2.5)[mask])
    assert (hole & ~mask).any() and not result[hole & ~mask].any()
    assert np.array_equal(result[~hole], background[~hole])
    assert np.array_equal(hints.hint("color", image, mask, background, hole), hints.blur_hint(image, mask))
    with pytest.raises(UserError, match="give background and hole"):
        hints.hint("color", image, mask, surroundings=True)
