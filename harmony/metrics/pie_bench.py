"""The figures of PIE-Bench (Ju 2023), in its units: what an edit has changed where it should change nothing.

Its masks blacken pictures before they are compared, so that masked pixels count as equal ones. Images are uint8
H x W x 3 RGB, masks bool H x W, true where the edit may change the picture.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from harmony.metrics.fidelity import PSNR_LIMIT, mse, psnr, ssim


def blacken(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``image``, black where ``mask`` is true."""
    return np.where(mask[..., None], np.uint8(0), image)


def background_metrics(output: np.ndarray, source: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """PSNR in dB (100 for identical ones), MSE x 10,000 of values in 0..1, SSIM x 100: outside the mask.

    NaN where the mask is the whole picture.
    """
    if mask.all():
        return dict.fromkeys(("pie/psnr", "pie/mse", "pie/ssim"), math.nan)
    pair = blacken(output, mask), blacken(source, mask)
    return {
        "pie/psnr": min(psnr(*pair), PSNR_LIMIT),
        "pie/mse": 1e4 * mse(*pair) / 255**2,
        "pie/ssim": 100 * ssim(*pair),
    }


def network_metrics(
    outputs: Sequence[np.ndarray],
    sources: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    metrics: Sequence[Callable],
) -> dict[str, list[float]]:
    """LPIPS x 1000 outside the masks and the structure distance x 1000 of whole pictures, as far as they are asked for.

    ``metrics``: those of ``models/perception.py``.
    """
    figures = {}
    for metric in metrics:
        if metric.name == "structure":
            figures["pie/structure"] = metric(outputs, sources, masks)
        if metric.name == "lpips":
            pairs = ([blacken(y, m) for y, m in zip(images, masks, strict=True)] for images in (outputs, sources))
            values = zip(metric(*pairs, masks), masks, strict=True)
            figures["pie/lpips"] = [math.nan if mask.all() else 1000 * value for value, mask in values]
    return figures
