"""Fidelity: golden values, the wrap guard, and the published CIEDE2000 pairs."""

import json
import math

import numpy as np
import pytest

from harmony.metrics import fidelity


def flat(value, side=32):
    return np.full((side, side, 3), value, np.uint8)


def disc(side=96, radius=28):
    y, x = np.mgrid[0:side, 0:side] - side // 2
    return x**2 + y**2 <= radius**2


def noise(seed=0, side=96):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def checks(side=96, shift=0):
    y, x = (np.mgrid[0:side, 0:side] + shift) // 12
    return np.repeat(((x + y) % 2 * 200 + 20).astype(np.uint8)[..., None], 3, axis=2)


# --- pixels


@pytest.mark.parametrize("value, error", [(16, 256), (20, 400), (255, 65025)])
def test_differences_do_not_wrap(value, error):
    assert fidelity.mse(flat(0), flat(value)) == error == fidelity.mse(flat(value), flat(0))


@pytest.mark.parametrize("error, decibel", [(53.08, 30.881), (61.09, 30.271), (65.99, 29.936), (256, 24.048)])
def test_psnr_golden_values(error, decibel):
    assert fidelity.to_psnr(error) == pytest.approx(decibel, abs=5e-4)


def test_psnr_is_averaged_over_images():
    values = [fidelity.psnr(flat(0), flat(5)), fidelity.psnr(flat(0), flat(10))]  # MSE 25 and 100
    assert fidelity.mean_psnr(values) == pytest.approx(31.141, abs=5e-4)
    assert fidelity.to_psnr((25 + 100) / 2) == pytest.approx(30.172, abs=5e-4)


def test_identical_images_are_infinite_alone_and_finite_in_a_mean():
    assert fidelity.psnr(noise(), noise()) == math.inf
    assert fidelity.mean_psnr([math.inf, 20.0]) == 60.0


def test_foreground_and_shadow_look_only_where_they_should():
    output = noise()
    output[disc()] = np.where(output[disc()] >= 10, output[disc()] - 10, output[disc()] + 10)
    assert fidelity.fmse(output, noise(), disc()) == 100 and fidelity.fpsnr(output, noise(), disc()) < 29
    assert fidelity.fmse(output, noise(), ~disc()) == 0
    shadow = disc(radius=40)
    assert fidelity.shadow_mse(output, noise(), shadow, disc()) == 0
    assert fidelity.shadow_mse(output, noise(), shadow, disc(radius=20)) > 0
    assert math.isnan(fidelity.fmse(output, noise(), np.zeros((96, 96), bool)))


def test_bg_drift_is_the_largest_step_outside():
    output = noise()
    output[0, 0] = 255 - output[0, 0]
    expected = np.abs(output[0, 0].astype(int) - noise()[0, 0]).max()
    assert fidelity.bg_drift(output, noise(), disc()) == expected > 0
    inside = np.where(disc()[..., None], noise(1), noise())
    assert fidelity.bg_drift(inside, noise(), disc()) == 0
    assert fidelity.bg_drift(noise(1), noise(), np.ones((96, 96), bool)) == 0
    assert fidelity.bg_drift(flat(0), flat(255), np.zeros((32, 32), bool)) == 255


# --- color

SHARMA = """
50.0000 2.6772 -79.7751 50.0000 0.0000 -82.7485 2.0425
50.0000 3.1571 -77.2803 50.0000 0.0000 -82.7485 2.8615
50.0000 -1.3802 -84.2814 50.0000 0.0000 -82.7485 1.0000
50.0000 0.0000 0.0000 50.0000 -1.0000 2.0000 2.3669
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0009 7.1792
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0011 7.2195
50.0000 -0.0010 2.4900 50.0000 0.0009 -2.4900 4.8045
50.0000 2.5000 0.0000 73.0000 25.0000 -18.0000 27.1492
50.0000 2.5000 0.0000 61.0000 -5.0000 29.0000 22.8977
60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644
63.0109 -31.0961 -5.8663 62.8187 -29.7946 -4.0864 1.2630
22.7233 20.0904 -46.6940 23.0331 14.9730 -42.5619 2.0373
36.4612 47.8580 18.3852 36.2715 50.5065 21.2231 1.4146
90.8027 -2.0831 1.4410 91.1528 -1.6435 0.0447 1.4441
2.0776 0.0795 -1.1350 0.9033 -0.0636 -0.5514 0.9082
"""


def test_ciede2000_published_pairs():
    pairs = np.array([line.split() for line in SHARMA.split("\n") if line], dtype=float)
    assert len(pairs) == 15
    for first, second in ((pairs[:, :3], pairs[:, 3:6]), (pairs[:, 3:6], pairs[:, :3])):
        assert fidelity.deltaE_ciede2000(first, second) == pytest.approx(pairs[:, 6], abs=1e-4)


def test_ciede2000_of_equal_colors_is_zero():
    lab = np.random.default_rng(0).uniform(-60, 60, (50, 3)) + (60, 0, 0)
    assert (fidelity.deltaE_ciede2000(lab, lab) == 0).all()


def test_color_de_keeps_its_figures():
    """Measured before the formula came from a library: tables of earlier runs stay comparable."""
    tinted = (noise() * (0.9, 0.6, 0.5)).astype(np.uint8)
    assert fidelity.color_de(tinted, noise(1), disc()) == pytest.approx(24.95555936, abs=1e-6)


def test_color_de_of_nothing_is_no_number():
    assert math.isnan(fidelity.color_de(noise(), noise(1), np.zeros((96, 96), bool)))


def test_color_de_sees_color_not_texture():
    assert fidelity.color_de(noise(), noise(), disc()) == 0
    fine = (noise() // 8 + 100).astype(np.uint8)
    other_texture = (noise(1) // 8 + 100).astype(np.uint8)
    tinted = (fine * (1.0, 0.8, 0.8)).astype(np.uint8)
    assert fidelity.color_de(other_texture, fine, disc()) < 3 < 6 < fidelity.color_de(tinted, fine, disc())
    outside = np.where(disc()[..., None], fine, noise(2))
    assert fidelity.color_de(outside, fine, disc()) == 0


# --- edges and seams


def test_edge_f1():
    assert fidelity.edge_f1(checks(), checks(), disc()) == 1
    assert fidelity.edge_f1(checks(shift=1), checks(), disc()) > 0.9  # within the tolerance
    assert fidelity.edge_f1(checks(shift=4), checks(), disc()) < 0.5
    assert fidelity.edge_f1(flat(9, 96), checks(), disc()) == 0
    assert fidelity.edge_f1(flat(9, 96), flat(99, 96), disc()) == 1  # both without edges


def test_seam():
    mask = disc()
    assert fidelity.seam(noise(), noise(), mask) == 1
    pasted = np.where(mask[..., None], flat(160, 96), flat(100, 96))
    assert fidelity.seam(pasted, flat(100, 96), mask) == 61
    inner = flat(100, 96)
    inner[disc(radius=20)] = 160
    assert fidelity.seam(inner, flat(100, 96), mask) == 1


# --- all of them


def test_image_metrics_has_the_agreed_names_and_values():
    hole = disc(radius=34)
    output = np.where(hole[..., None], noise(1), noise())
    metrics = fidelity.image_metrics(output, noise(), disc(), hole)
    names = "psnr mse ssim fpsnr fmse bg_drift edge_f1 color_de seam seam_hole"
    assert list(metrics) == names.split() and metrics["ssim"] == fidelity.ssim(output, noise()) < 1
    assert metrics["fpsnr"] == fidelity.fpsnr(output, noise(), disc()) and metrics["bg_drift"] == 0
    assert metrics["fmse"] > metrics["mse"] > 0
    brighter = np.where(disc()[..., None], flat(160, 96), flat(100, 96))
    rims = fidelity.image_metrics(brighter, flat(100, 96), disc(), hole)
    assert rims["seam"] == 61 and rims["seam_hole"] == 1, "a composite's seam is at the rim of the instance"
    shadow = fidelity.image_metrics(output, noise(), disc(), hole, shadow=hole, instance=output)
    assert shadow["shadow_mse"] > 0 and shadow["color_de"] == 0 and shadow["edge_f1"] == 1
    assert all(isinstance(value, float) for value in shadow.values())


def test_aggregate_is_finite_and_keeps_the_worst_drift():
    rows = [
        {"psnr": math.inf, "fmse": 4.0, "bg_drift": 0.0, "seam": math.nan},
        {"psnr": 20.0, "fmse": 2.0, "bg_drift": 7.0, "shadow_mse": 5.0, "seam": math.nan},
    ]
    result = fidelity.aggregate(rows)
    assert result == {"psnr": 60.0, "fmse": 3.0, "bg_drift": 7.0, "shadow_mse": 5.0}
    json.dumps(result, allow_nan=False)


def test_the_largest_drift_counts_wherever_it_is_measured():
    rows = [{"bg_drift": 3.0, "raw/bg_drift": 3.0, "raw/shift": 1.0}, {"bg_drift": 9.0, "raw/bg_drift": 200.0}]
    assert fidelity.aggregate(rows) == {"bg_drift": 9, "raw/bg_drift": 200, "raw/shift": 1}


def test_standard_errors_are_those_of_differences():
    """Guards pairing: what two methods have in common is no error; nor do identical images make PSNR infinite."""
    rng = np.random.default_rng(0)
    common, own = 100 * rng.random(50), rng.random(50)
    rows = [{"fmse": a + b, "fpsnr": math.inf, "bg_drift": 3.0, "edge_f1": math.nan} for a, b in zip(common, own)]
    others = [{"fmse": a, "fpsnr": 100.0, "bg_drift": 1.0, "edge_f1": 1.0} for a in common]
    others[0] |= {"fmse": math.nan}
    errors = fidelity.standard_errors(rows, others)
    assert errors == {"fmse": pytest.approx(own[1:].std(ddof=1) / 7), "fpsnr": 0.0}
