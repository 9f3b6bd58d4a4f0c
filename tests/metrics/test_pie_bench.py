"""PIE-Bench's figures against torchmetrics on pictures that are masked as its own code masks them."""

import numpy as np
import pytest
import torch
import torchmetrics.functional as theirs

from harmony.metrics.pie_bench import background_metrics, network_metrics

RNG = np.random.default_rng(0)
SOURCE = RNG.integers(0, 256, (64, 80, 3), dtype=np.uint8)
OUTPUT = np.clip(SOURCE + RNG.normal(0, 20, SOURCE.shape), 0, 255).astype(np.uint8)
MASK = np.zeros((64, 80), bool)
MASK[10:40, 20:60] = True


def test_the_background_is_measured_as_its_code_does():
    """Guards the blackened pixels, which count, and the units of its tables."""
    a, b = (
        torch.from_numpy(p / 255 * ~MASK[..., None]).permute(2, 0, 1)[None].float().contiguous()
        for p in (OUTPUT, SOURCE)
    )
    figures = background_metrics(OUTPUT, SOURCE, MASK)
    assert figures["pie/psnr"] == pytest.approx(float(theirs.peak_signal_noise_ratio(a, b, data_range=1.0)), abs=1e-3)
    assert figures["pie/mse"] == pytest.approx(1e4 * float(theirs.mean_squared_error(a, b)), rel=1e-4)
    expected = float(theirs.structural_similarity_index_measure(a, b, data_range=1.0))
    assert figures["pie/ssim"] == pytest.approx(100 * expected, abs=0.02)


def test_inside_the_mask_anything_may_change():
    other = np.where(MASK[..., None], 255 - SOURCE, SOURCE)
    assert background_metrics(other, SOURCE, MASK) == {"pie/psnr": 100, "pie/mse": 0, "pie/ssim": pytest.approx(100)}


def test_networks_see_the_background_or_the_whole():
    """Guards which pictures go where: blackened ones to LPIPS, whole ones to the structure distance."""
    seen = {}

    class Metric:
        def __init__(self, name: str):
            self.name = name

        def __call__(self, outputs, sources, masks):
            seen[self.name] = outputs[0], sources[0]
            return [0.25]

    names = ("structure", "lpips", "dino_i")
    figures = network_metrics([OUTPUT], [SOURCE], [MASK], [Metric(name) for name in names])
    assert figures == {"pie/structure": [0.25], "pie/lpips": [250.0]}
    assert np.array_equal(seen["structure"][0], OUTPUT) and not seen["lpips"][0][MASK].any()
    assert np.array_equal(seen["lpips"][1][~MASK], SOURCE[~MASK])
