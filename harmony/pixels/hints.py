"""Condition operators: what a network sees of the instance.

Each makes a hint, uint8 H x W x 3, of an image and its instance mask M. The operator and its parameters must be the
same in training and at test time. What Paint by Example sees is cut from the photograph: see ``exemplars``.
"""

import math

import cv2
import numpy as np
import torch

from harmony.core.errors import UserError
from harmony.pixels.masks import scaled


def instance_on_black(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """F = M x: the instance on black, uint8 H x W x 3."""
    return image * mask[..., None]


def blur_hint(image: np.ndarray, mask: np.ndarray, sigma: float = 10, normalize: bool = True) -> np.ndarray:
    """Colour (low frequency): Gaussian blur of the instance, 0 outside M.

    ``sigma`` is in pixels at a side of 512. ``normalize`` divides by the blurred mask, so that the rim is not darkened
    by the black around it; False is the literal reading of Liu 2025 (and also cut off at M).
    """
    sigma_px = scaled(sigma, mask.shape)
    size = 2 * math.ceil(3 * sigma_px) + 1  # +-3 sigma: 61 taps at sigma 10
    weight = mask.astype(np.float32)
    blurred = cv2.GaussianBlur(image * weight[..., None], (size, size), sigma_px)
    if normalize:
        blurred /= np.maximum(cv2.GaussianBlur(weight, (size, size), sigma_px), 1e-6)[..., None]
    return np.clip(np.rint(blurred), 0, 255).astype(np.uint8) * mask[..., None]


def edge_hint(
    image: np.ndarray, mask: np.ndarray, low: float = 100, high: float = 200, edge_source: str = "masked"
) -> np.ndarray:
    """Structure (high frequency): OpenCV's Canny edges (aperture 3, L1 gradient) of the 8-bit grey, 0 or 255.

    ``masked`` takes the edges of the instance on black, silhouette included, so they may lie one pixel outside M;
    ``full_times_mask`` those of the whole image, cut off at M.
    """
    match edge_source:
        case "masked":
            edges = canny(instance_on_black(image, mask), low, high)
        case "full_times_mask":
            edges = canny(image, low, high) & mask
        case _:
            raise UserError(f"edge_source '{edge_source}' is unknown; use masked or full_times_mask")
    return np.repeat(edges[..., None].astype(np.uint8) * 255, 3, axis=2)


def canny(image: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """Canny edges of a uint8 RGB image, bool H x W. OpenCV's definition: other libraries blur first and differ."""
    return cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), low, high) > 0


def raw_hint(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The instance itself on black: the ablation of Liu 2025, Fig. 7."""
    return instance_on_black(image, mask)


HINTS = {"color": blur_hint, "structure": edge_hint, "raw": raw_hint}


def hint(branch: str, image: np.ndarray, mask: np.ndarray, **params) -> np.ndarray:
    """The hint of ``branch``, uint8; ``params`` go to its operator. Raises UserError for an unknown name."""
    if branch not in HINTS:
        raise UserError(f"branch '{branch}' is unknown; use one of {', '.join(HINTS)}")
    return HINTS[branch](image, mask, **params)


def check_hint(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself if it is a hint, all values in [0, 1]. Raises UserError for anything else, NaN too."""
    low, high = tensor.aminmax()
    if not (low >= 0 and high <= 1):
        raise UserError(f"a hint must lie in [0, 1] but spans [{low:.3g}, {high:.3g}]; make it with images.to_hint")
    return tensor
