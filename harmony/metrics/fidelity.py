"""Fidelity of one output to its truth: pixels, edges, colors, seams.

Images are uint8 H x W x 3 RGB, masks bool H x W. All arithmetic is in floats on 0..255. A metric over an empty
mask is NaN, which ``aggregate`` leaves out.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import cv2
import numpy as np
from skimage.color import deltaE_ciede2000
from skimage.metrics import structural_similarity

from harmony.pixels.hints import blur_instance, edge_hint
from harmony.pixels.masks import scale_length

PSNR_LIMIT = 100.0  # dB: the value of an identical image in a mean; a single gray step in a 128 px image gives 95 dB
SSIM_WINDOW = 11  # px
COLOR_SIGMA = 10  # px at a side of 512, as Liu 2025 blurs the color hint


# --- pixels


def _squared_errors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(a - b)^2, float64: in uint8 the difference would wrap modulo 256."""
    return (a.astype(np.float64) - b.astype(np.float64)) ** 2


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


def mse(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared error, 0..65025."""
    return _mean(_squared_errors(a, b))


def to_psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error on 0..255; infinite for 0."""
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of one pair, infinite for identical images."""
    return to_psnr(mse(a, b))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of one pair (Wang 2004: Gaussian window, sigma 1.5), mean of the channels; 1 = identical.

    The mean is over all pixels, those at the border too, as torchmetrics takes it. NaN for images of fewer than 11
    pixels a side.
    """
    if min(a.shape[:2]) < SSIM_WINDOW:
        return math.nan
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(a, b, channel_axis=-1, data_range=255, full=True, **window)[1].mean())


def fmse(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    """Mean squared error of the pixels in ``mask`` alone (foreground), 0..65025."""
    return _mean(_squared_errors(a[mask], b[mask]))


def fpsnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    """PSNR in dB of the pixels in ``mask`` alone."""
    return to_psnr(fmse(a, b, mask))


def shadow_mse(a: np.ndarray, b: np.ndarray, shadow: np.ndarray, mask: np.ndarray) -> float:
    """Mean squared error where the shadow falls outside the instance, 0..65025."""
    return fmse(a, b, shadow & ~mask)


def bg_drift(output: np.ndarray, original: np.ndarray, hole: np.ndarray) -> float:
    """Largest absolute difference outside ``hole``, 0..255. 0 means that no background pixel changed."""
    difference = np.abs(output.astype(np.int16) - original.astype(np.int16))[~hole]
    return float(difference.max(initial=0))


# --- identity of the instance


def edge_f1(output: np.ndarray, instance: np.ndarray, mask: np.ndarray) -> float:
    """F1 score in [0, 1] of the output's Canny edges against the instance's inside ``mask``, 1 px tolerance.

    The edges are those of the whole images, cut off at the mask. The silhouette, which both images share, would raise
    the score otherwise. Two images without edges score 1.
    """
    edges, true_edges = (
        edge_hint(image, mask, edge_source="full_times_mask")[..., 0] > 0 for image in (output, instance)
    )
    if not edges.any() or not true_edges.any():
        return float(edges.any() == true_edges.any())
    precision, recall = (
        (edges & _grow(true_edges)).sum() / edges.sum(),
        (true_edges & _grow(edges)).sum() / true_edges.sum(),
    )
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def _grow(edges: np.ndarray) -> np.ndarray:
    return cv2.dilate(edges.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0


def color_de(output: np.ndarray, instance: np.ndarray, mask: np.ndarray) -> float:
    """Mean CIEDE2000 inside ``mask`` between the blurred instance and the blurred output.

    A difference of 1 is just visible. Sharma 2005 (The CIEDE2000 Color-Difference Formula).
    """
    if not mask.any():
        return math.nan
    colors = (blur_instance(image, mask, scale_length(COLOR_SIGMA, mask.shape))[mask] for image in (output, instance))
    return _mean(deltaE_ciede2000(*(_lab(pixels) for pixels in colors)))


def _lab(pixels: np.ndarray) -> np.ndarray:
    """sRGB uint8 N x 3 to CIE Lab (D65) N x 3, float64; L in 0..100."""
    return cv2.cvtColor(pixels[None].astype(np.float32) / 255, cv2.COLOR_RGB2Lab)[0].astype(np.float64)


def sharpness(output: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Variance of the Laplacian of the gray levels inside ``mask``, relative to the truth's: below 1 = blurred.

    One is added to both variances (squared gray levels), so that a smooth truth does not divide by zero.
    """
    return (_laplacian_variance(output, mask) + 1) / (_laplacian_variance(truth, mask) + 1)


def _laplacian_variance(image: np.ndarray, mask: np.ndarray) -> float:
    values = cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_64F)[mask]
    return float(values.var()) if values.size else math.nan


# --- the seam


def seam(output: np.ndarray, original: np.ndarray, mask: np.ndarray) -> float:
    """Mean step across the rim of ``mask`` relative to the original's: 1 = the same, above 1 = a visible seam.

    One gray level is added to both steps, so that a perfectly smooth original does not divide by zero.
    """
    return (_rim_step(output, mask) + 1) / (_rim_step(original, mask) + 1)


def _rim_step(image: np.ndarray, mask: np.ndarray) -> float:
    """Mean absolute difference, 0..255, of neighboring pixels of which exactly one lies in ``mask``."""
    values = image.astype(np.float64)
    steps = np.concatenate([np.abs(np.diff(values, axis=axis))[np.diff(mask, axis=axis)] for axis in (0, 1)])
    return _mean(steps)


# --- all of them


def image_metrics(
    output: np.ndarray,
    truth: np.ndarray,
    mask: np.ndarray,
    hole: np.ndarray,
    shadow: np.ndarray | None = None,
    instance: np.ndarray | None = None,
) -> dict[str, float]:
    """All metrics of one output: psnr, mse, ssim, fpsnr, fmse, bg_drift, edge_f1, color_de, seam; shadow_mse with
    ``shadow``.

    ``mask`` is M, ``hole`` M_e; ``seam`` is measured at the rim of the instance, ``seam_hole`` at the rim of the hole,
    where generated pixels end. ``instance`` is the image that edge_f1 and color_de compare the output with, by default
    the truth.
    """
    reference = truth if instance is None else instance
    error, foreground_error = mse(output, truth), fmse(output, truth, mask)
    metrics = {
        "psnr": to_psnr(error),
        "mse": error,
        "ssim": ssim(output, truth),
        "fpsnr": to_psnr(foreground_error),
        "fmse": foreground_error,
        "bg_drift": bg_drift(output, truth, hole),
        "edge_f1": edge_f1(output, reference, mask),
        "color_de": color_de(output, reference, mask),
        "seam": seam(output, truth, mask),
        "seam_hole": seam(output, truth, hole),
    }
    return metrics if shadow is None else metrics | {"shadow_mse": shadow_mse(output, truth, shadow, mask)}


def mean_psnr(values: Iterable[float]) -> float:
    """Mean over images of the per-image PSNR in dB, not the PSNR of the mean error; identical images count 100 dB."""
    return float(np.minimum(list(values), PSNR_LIMIT).mean())


# How a metric is reduced over images; all others by the mean.
REDUCTIONS = {"bg_drift": max, "psnr": mean_psnr, "fpsnr": mean_psnr}


def reduction(name: str) -> Callable:
    """How the metric ``name`` is reduced, whatever stands before it: raw/bg_drift as bg_drift."""
    return REDUCTIONS.get(name.rpartition("/")[2], np.mean)


def standard_errors(rows: Sequence[dict[str, float]], others: Sequence[dict[str, float]]) -> dict[str, float]:
    """Standard errors of the mean differences between the metrics of two methods on the same images.

    Metrics that are reduced otherwise than by a mean have none; images where either is NaN are left out.
    """
    errors = {}
    for name in rows[0]:
        if reduction(name) is max or name not in others[0]:
            continue
        values, references = (np.minimum([row[name] for row in part], limit(name)) for part in (rows, others))
        differences = (values - references)[~np.isnan(values - references)]
        if len(differences) > 1:
            errors[name] = float(differences.std(ddof=1) / math.sqrt(len(differences)))
    return errors


def limit(name: str) -> float:
    """The largest value of a metric that counts in a mean."""
    return PSNR_LIMIT if reduction(name) is mean_psnr else math.inf


def aggregate(rows: list[dict[str, float]]) -> dict[str, float]:
    """Reduce the metrics of many images: the maximum of ``bg_drift``, the mean of all others, NaN left out.

    A metric that is NaN for all images is left out of the result.
    """
    result = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row and not math.isnan(row[name])]
        if values:
            result[name] = float(reduction(name)(values))
    return result
