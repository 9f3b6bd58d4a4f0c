"""Hints: the pictures of the instance that a ControlNet is conditioned on.

An operator turns an image and its instance mask M into a hint, uint8 H x W x 3. The operator and its parameters must be
the same in training and at test time. For the exemplars of Paint by Example see ``exemplars``.
"""

import math

import cv2
import numpy as np
import torch

from harmony.core.errors import UserError


def instance_on_black(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """F = M x: the instance on black, uint8 H x W x 3."""
    return image * mask[..., None]


def blur_instance(image: np.ndarray, mask: np.ndarray, sigma: float, normalize: bool = True) -> np.ndarray:
    """Gaussian blur of the instance, ``sigma`` in pixels, 0 outside M; uint8 H x W x 3.

    ``normalize`` divides by the blurred mask, so that the black around the instance does not darken the rim; False is
    the literal reading of Liu 2025 (also cut off at M).
    """
    size = 2 * math.ceil(3 * sigma) + 1  # +-3 sigma: 61 taps at sigma 10
    weight = mask.astype(np.float32)
    color = cv2.GaussianBlur(image * weight[..., None], (size, size), sigma)
    if normalize:
        color /= np.maximum(cv2.GaussianBlur(weight, (size, size), sigma), 1e-6)[..., None]
    return np.clip(np.rint(color), 0, 255).astype(np.uint8) * mask[..., None]


def blur_hint(
    image: np.ndarray, mask: np.ndarray, blur: float = 1.25, normalize: bool = True, cell: int = 8
) -> np.ndarray:
    """Color hint (low frequency): the instance under a Gaussian blur, 0 outside M.

    ``blur`` is its sigma in latent cells of ``cell`` pixels. Structure finer than a cell is what the color hint must
    not show, so that a smaller backbone needs the same blur in cells, not in pixels: 1.25 cells are 10 pixels at 512 on
    Stable Diffusion (61 taps) and 5 at 64 on the tiny backbone. ``normalize``: see ``blur_instance``.
    """
    return blur_instance(image, mask, blur * cell, normalize)


def edge_hint(
    image: np.ndarray, mask: np.ndarray, low: float = 100, high: float = 200, edge_source: str = "masked"
) -> np.ndarray:
    """Structure hint (high frequency): Canny edges of OpenCV (aperture 3, L1 gradient) of the gray image, 0 or 255.

    ``masked``: edges of the instance on black, with the silhouette, so that they may lie one pixel outside M.
    ``full_times_mask``: edges of the whole image, cut off at M.
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
    """Canny edges of a uint8 RGB image, bool H x W. Other libraries blur first and differ."""
    return cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), low, high) > 0


def raw_hint(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The instance itself on black: the ablation of Liu 2025, Fig. 7."""
    return instance_on_black(image, mask)


HINTS = {"color": blur_hint, "structure": edge_hint, "raw": raw_hint}


def hint(
    branch: str,
    image: np.ndarray,
    mask: np.ndarray,
    background: np.ndarray | None = None,
    hole: np.ndarray | None = None,
    cell: int = 8,
    surroundings: bool = False,
    **params,
) -> np.ndarray:
    """The hint of ``branch``, uint8; ``params`` are its operator's. Raises UserError for an unknown branch.

    ``cell``: pixels of a latent cell of the backbone, its VAE's factor.

    ``surroundings``: outside ``hole`` it shows ``background`` instead of black, so that a ControlNet, which otherwise
    sees the object alone, can compare the object's light with the light around it.
    """
    if branch not in HINTS:
        raise UserError(f"branch '{branch}' is unknown; use one of {', '.join(HINTS)}")
    picture = HINTS[branch](image, mask, **(params | {"cell": cell} if branch == "color" else params))
    if not surroundings:
        return picture
    if background is None or hole is None:
        raise UserError(f"the {branch} hint shows its surroundings: give background and hole")
    return np.where((hole | mask)[..., None], picture, background)


def check_hint(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` if all values are in [0, 1], the hint range. Raises UserError otherwise, also for NaN."""
    low, high = tensor.aminmax()
    if not (low >= 0 and high <= 1):
        raise UserError(f"a hint must lie in [0, 1] but spans [{low:.3g}, {high:.3g}]; make it with images.to_hint")
    return tensor
