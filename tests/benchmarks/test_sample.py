"""The sampling bench: ours and the stock pipeline, exact and near-exact."""

import numpy as np

from harmony.benchmarks.sample import Scene, bench_sample, list_modes
from harmony.models.backbone import Backbone
from harmony.sampling.guidance import Settings


def test_both_ways_fill_the_same_holes(random_backbone):
    """Guards the comparison: same pictures, holes, hints and weights, the same guidance; the noise alone differs."""
    scene = Scene(Backbone(str(random_backbone)), 2)
    ours, theirs = scene.prepare_ours(Settings(2, 3.0))(), scene.prepare_stock(2, 3.0)().images
    assert len(ours) == len(theirs) == 2 and ours[0].shape == (32, 32, 3) and theirs.shape == (2, 3, 32, 32)
    assert np.isfinite(theirs.numpy()).all() and not np.array_equal(ours[0], ours[1])


def test_the_bench_of_sampling(random_backbone):
    found = bench_sample(Backbone(str(random_backbone)), 1, 5, 2.0, 1, say=lambda line: None)
    assert list(found) == ["sample", *(f"sample_{name}" for name in list_modes("cpu"))]
    assert {"ours", "ratio", "tflops", "share_of_peak", "seconds"} <= set(found["sample"])
    assert "tflops" not in found["sample_near"] and found["sample_near"]["ratio"] > 0
