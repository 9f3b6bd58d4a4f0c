"""Composites: not one background pixel changes; the baselines do what Reinhard 2001 and Perez 2003 say."""

import cv2
import numpy as np
import pytest

from harmony.core.errors import UserError
from harmony.pixels import composites, masks


def disc(side=96, radius=24, center=(48, 48)):
    y, x = np.mgrid[0:side, 0:side]
    return (x - center[0]) ** 2 + (y - center[1]) ** 2 <= radius**2


def noise(seed, height=96, width=96):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def waves(offset=0.0):
    y, x = np.mgrid[0:96, 0:96] / 12
    return np.rint(110 + 40 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1) + offset).astype(np.uint8)


def test_copy_paste():
    result = composites.copy_paste(noise(0), noise(1), disc())
    assert np.array_equal(result[disc()], noise(1)[disc()]) and np.array_equal(result[~disc()], noise(0)[~disc()])


@pytest.mark.parametrize("radius", [0, 6])
def test_paste_back_is_bit_exact_outside(radius):
    result = composites.paste_back(noise(1), noise(0), disc(), radius)
    assert result.dtype == np.uint8 and np.array_equal(result[~disc()], noise(0)[~disc()])
    core = masks.feather(disc(), radius) == 1
    assert core.any() and np.array_equal(result[core], noise(1)[core])
    empty = np.zeros((96, 96), bool)
    assert np.array_equal(composites.paste_back(noise(1), noise(0), empty, radius), noise(0))


def test_feathered_paste_lies_between():
    black, white = np.zeros((96, 96, 3), np.uint8), np.full((96, 96, 3), 255, np.uint8)
    result = composites.paste_back(white, black, disc(), 8)[48, :, 0]
    assert 0 < result[48 + 22] < result[48 + 19] < 255


def test_reinhard_takes_over_the_statistics():
    dark = (waves() * 0.4).astype(np.uint8)
    bright = (waves() * 0.5 + 100).astype(np.uint8)
    result = composites.reinhard(dark, disc(), bright)
    lab = [cv2.cvtColor(i.astype(np.float32) / 255, cv2.COLOR_RGB2Lab) for i in (result, bright)]
    assert np.abs(lab[0][disc()].mean(0) - lab[1][~disc()].mean(0)).max() < 0.5
    assert np.abs(lab[0][disc()].std(0) - lab[1][~disc()].std(0)).max() < 0.5
    hidden = np.where(disc()[..., None], np.uint8(255), bright)
    assert np.array_equal(composites.reinhard(dark, disc(), hidden), result), "what lies under the object has no say"
    assert np.array_equal(result[~disc()], dark[~disc()])


def test_reinhard_of_one_flat_colour_is_the_background_mean():
    flat = np.full((96, 96, 3), 77, np.uint8)
    result = composites.reinhard(flat, disc(), waves())
    assert len(np.unique(result[disc()], axis=0)) == 1 and np.array_equal(result[~disc()], flat[~disc()])


CORNERS = {
    "inside": disc(),
    "corner": disc(center=(0, 0)),
    "edge": disc(center=(95, 40), radius=31),
    "whole": np.ones((96, 96), bool),
    "pixel": disc(radius=0),
    "line": disc() & (np.arange(96) == 48),
}


@pytest.mark.parametrize("mask", CORNERS.values(), ids=CORNERS)
def test_poisson_is_aligned_and_exact_outside(mask):
    """An image cloned into itself stays itself, wherever the mask lies: the clone is not shifted by a pixel."""
    same = composites.poisson(waves(), waves(), mask)
    assert np.array_equal(same, waves())
    other = composites.poisson(waves(), noise(1), mask)
    assert np.array_equal(other[~mask], waves()[~mask])


@pytest.mark.parametrize("name", ["inside", "corner", "edge"])
def test_poisson_removes_a_shift_of_brightness(name):
    """A foreground that is only brighter has the same gradients, so that the background comes back."""
    result = composites.poisson(waves(), waves(offset=80), CORNERS[name])
    assert np.abs(result.astype(int) - waves())[CORNERS[name]].mean() < 8


def test_poisson_reaches_narrow_objects():
    mask = masks.box_mask((20, 10, 25, 80), 96, 96)
    texture = (noise(1) // 4 + 96).astype(np.uint8)
    result = composites.poisson(np.full((96, 96, 3), 128, np.uint8), texture, mask)
    assert (result[mask] != 128).mean() > 0.9
    correlation = np.corrcoef(result[mask].ravel().astype(float), texture[mask].ravel())[0, 1]
    assert correlation > 0.5


@pytest.mark.parametrize("surroundings", [True, False])
@pytest.mark.parametrize("name", [name for name in CORNERS if name != "whole"])
def test_poisson_solves_its_equation(name, surroundings):
    """Guards eq. 7 of Perez 2003, written out pixel by pixel: |N| f_p - sum f_q = sum v_pq, with f = background outside
    the mask and no neighbors beyond the picture.
    """
    mask, background, foreground = CORNERS[name], waves().astype(float), noise(1).astype(float)
    f = np.where(mask[..., None], composites.solve_poisson(background, foreground, mask, surroundings), background)
    for y, x in np.argwhere(mask)[:: max(1, mask.sum() // 200)]:
        neighbors = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        neighbors = [(v, u) for v, u in neighbors if 0 <= v < 96 and 0 <= u < 96]
        left = sum(f[y, x] - f[q] for q in neighbors)
        right = sum(foreground[y, x] - foreground[q] for q in neighbors if mask[q] or surroundings)
        assert np.allclose(left, right, atol=1e-6), (y, x)


def test_poisson_of_the_whole_picture_has_the_mean_of_the_background():
    mask = np.ones((96, 96), bool)
    values = composites.solve_poisson(waves().astype(float), noise(1).astype(float), mask)
    assert np.allclose(values.mean((0, 1)), waves().mean((0, 1)))
    assert np.allclose(np.diff(values, axis=0), np.diff(noise(1).astype(float), axis=0))


def test_poisson_of_a_cut_out_continues_the_background():
    """Guards cut-outs, which are black around the object: a flat one becomes the background that surrounds it."""
    cut_out = np.where(disc()[..., None], np.uint8(200), np.uint8(0)).repeat(3, axis=2)
    result = composites.poisson(np.full((96, 96, 3), 90, np.uint8), cut_out, disc(), surroundings=False)
    assert (result == 90).all()


def test_poisson_of_nothing_is_the_background():
    assert np.array_equal(composites.poisson(waves(), noise(1), np.zeros((96, 96), bool)), waves())


# --- placing


def test_place_at_its_own_size_only_moves():
    mask = disc(radius=10, center=(20, 30))
    canvas, moved = composites.place(noise(0), mask, (50, 60, 71, 81), 120, 90)
    assert canvas.shape == (90, 120, 3) and moved.shape == (90, 120)
    assert masks.bounding_box(moved) == (50, 60, 71, 81)
    assert np.array_equal(canvas[moved], noise(0)[mask]) and not canvas[~moved].any()


@pytest.mark.parametrize("scale", [0.5, 2])
def test_place_keeps_aspect_centered_and_bottom_aligned(scale):
    mask = masks.box_mask((10, 10, 50, 30), 96, 96)  # 40 x 20
    w, h = 40 * scale, 20 * scale
    _, moved = composites.place(noise(0), mask, (20, 10, 20 + w, 10 + 3 * h), 160, 160)
    assert masks.bounding_box(moved) == (20, 10 + 2 * h, 20 + w, 10 + 3 * h)
    _, moved = composites.place(noise(0), mask, (20, 10, 20 + 2 * w, 10 + h), 160, 160)
    assert masks.bounding_box(moved) == (20 + w / 2, 10, 20 + 3 * w / 2, 10 + h)


@pytest.mark.parametrize("side", [30, 200])
def test_place_lets_nothing_of_the_old_background_in(side):
    picture = np.where(disc()[..., None], np.uint8(100), np.array([255, 0, 255], np.uint8))
    canvas, moved = composites.place(picture, disc(), (5, 5, 5 + side, 5 + side), 220, 220)
    assert moved.any() and np.abs(canvas[moved].astype(int) - 100).max() <= 1


def test_place_is_cut_at_the_border_and_refuses_what_cannot_be_seen():
    _, moved = composites.place(noise(0), disc(), (-20, 60, 30, 120), 90, 90)
    assert moved.any() and masks.bounding_box(moved)[0] == 0
    with pytest.raises(UserError, match="shows nothing"):
        composites.place(noise(0), disc(), (200, 0, 250, 50), 90, 90)
    with pytest.raises(UserError, match="no area"):
        composites.place(noise(0), disc(), (20, 20, 20, 40), 90, 90)
    with pytest.raises(UserError, match="empty"):
        composites.place(noise(0), np.zeros((96, 96), bool), (0, 0, 9, 9), 90, 90)


def test_other_light_changes_all_but_the_content():
    """Guards the photometric change: black stays black, the order of grays stays, the picture is another."""
    ramp = np.repeat(np.arange(0, 256, 5, dtype=np.uint8)[None, :, None], 3, axis=2)
    seen = [composites.change_light(ramp, np.random.default_rng(seed)) for seed in range(20)]
    for image in seen:
        assert image.dtype == np.uint8 and image.shape == ramp.shape and not image[:, 0].any()
        assert (np.diff(image.astype(int), axis=1) >= 0).all() and np.abs(image.astype(int) - ramp).max() > 5
    means = np.array([image.mean((0, 1)) for image in seen])
    assert means.mean(1).std() > 10 and (means[:, 0] - means[:, 2]).std() > 5, "exposure and white balance both vary"
    assert np.array_equal(seen[3], composites.change_light(ramp, np.random.default_rng(3)))


def test_a_change_of_light_is_carried_to_the_full_size():
    """Guards ``carry_change``: detail stays, the rim changes by as much as the inside, texture of the output is not
    taken, nothing changes where nothing did and outside the mask.
    """
    rng, small_mask = np.random.default_rng(0), np.zeros((32, 32), bool)
    small_mask[8:24, 8:24] = True
    mask = np.kron(small_mask, np.ones((4, 4), bool))
    picture = rng.integers(60, 140, (128, 128, 3)).astype(np.uint8)
    before = np.full((32, 32, 3), 100, np.uint8)
    light = composites.to_values(composites.to_radiance(before) * np.float32([1.5, 1, 0.5]))
    after = np.where(small_mask[..., None], light, np.uint8(7))  # what happens outside does not leak in
    carried = composites.carry_change(before, after, small_mask, picture, mask)
    ratio = composites.to_radiance(carried[mask]).mean(0) / composites.to_radiance(picture[mask]).mean(0)
    assert ratio == pytest.approx([1.38, 1, 0.62], abs=0.01), "of 1.5 and 0.5: darkness says little"
    correlation = np.corrcoef(carried[mask][:, 0], picture[mask][:, 0])[0, 1]
    assert correlation > 0.999 and np.array_equal(carried[~mask], picture[~mask])
    assert np.array_equal(composites.carry_change(before, before, small_mask, picture, mask), picture)
    stripes = after.copy()
    stripes[::2], stripes[1::2] = (np.clip(after[i::2].astype(int) + d, 0, 255) for i, d in ((0, 20), (1, -20)))
    striped = composites.carry_change(before, stripes, small_mask, picture, mask)[mask].astype(int) - carried[mask]
    assert np.abs(striped).max() <= 4, "their mean is taken, not the stripes"
    bright = composites.carry_change(before, np.full_like(after, 200), small_mask, np.full_like(picture, 250), mask)
    assert bright[mask].min() == 255, "it is clipped, not wrapped"
    assert np.array_equal(composites.carry_change(before, after, small_mask & False, picture, mask), picture)


def test_histograms_match():
    """Guards the direction: the object gets the background's distribution, outside nothing changes."""
    rng, mask = np.random.default_rng(0), np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    background = rng.integers(100, 140, (40, 40, 3)).astype(np.uint8)
    foreground = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
    matched = composites.match_histogram(foreground, mask, background)
    assert np.array_equal(matched[~mask], background[~mask])
    quantiles = [
        np.quantile(image[where], (0.1, 0.5, 0.9), axis=0) for image, where in ((matched, mask), (background, ~mask))
    ]
    assert np.abs(np.subtract(*quantiles)).max() <= 2
    assert np.array_equal(composites.match_histogram(foreground, mask | True, background), foreground)
