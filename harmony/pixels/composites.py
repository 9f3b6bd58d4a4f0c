"""Composites without a network: placing, pasting and the classic baselines. Images uint8 H x W x 3, masks bool."""

from collections.abc import Sequence

import cv2
import numpy as np
from scipy.sparse import csc_array, diags_array
from scipy.sparse.linalg import splu

from harmony.core.errors import UserError
from harmony.pixels.images import resize
from harmony.pixels.masks import bounding_box, feather, scale_length

CHANGE_SIGMA = 128  # px at 512: below this length a change is texture, not light
LARGEST_PLACED = 8  # times the picture's longer side: what an object that is placed may measure
DARK = 0.04  # radiance in 0..1 that is added before radiances are divided: darkness says little about the light
BEFORE, BEHIND, ALL = slice(None, -1), slice(1, None), slice(None)
NEIGHBORS = (  # (pixels, their neighbors) in the four directions
    ((BEHIND, ALL), (BEFORE, ALL)),
    ((BEFORE, ALL), (BEHIND, ALL)),
    ((ALL, BEHIND), (ALL, BEFORE)),
    ((ALL, BEFORE), (ALL, BEHIND)),
)


def copy_paste(background: np.ndarray, foreground: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The naive composite: ``foreground`` inside ``mask``, ``background`` elsewhere."""
    return np.where(mask[..., None], foreground, background)


def paste_back(output: np.ndarray, background: np.ndarray, hole: np.ndarray, radius: float = 0) -> np.ndarray:
    """Paste ``output`` into the hole: M_s output + (1 - M_s) background, uint8, bit-exact outside ``hole``.

    M_s is the hole; with ``radius`` > 0 its rim is feathered inwards over that many pixels.
    """
    alpha = feather(hole, radius)[..., None]
    return np.rint(alpha * output + (1 - alpha) * background).astype(np.uint8)


def reinhard(foreground: np.ndarray, mask: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Color transfer: give the masked pixels the background's mean and standard deviation in each channel of CIE Lab.

    The background's statistics are those outside ``mask``, because the object itself may lie under the mask; if the
    mask covers everything, those of the whole background. Pixels outside ``mask`` do not change. Reinhard 2001 (Color
    Transfer between Images), in OpenCV's Lab of sRGB instead of l-alpha-beta.
    """
    if not mask.any():
        return foreground.copy()
    lab = _lab(foreground)
    source, target = lab[mask], _lab(background)[np.ones_like(mask) if mask.all() else ~mask]
    gain = target.std(axis=0) / np.maximum(source.std(axis=0), 1e-3)
    lab[mask] = (source - source.mean(axis=0)) * gain + target.mean(axis=0)
    rgb = np.rint(np.clip(cv2.cvtColor(lab, cv2.COLOR_Lab2RGB), 0, 1) * 255).astype(np.uint8)
    return np.where(mask[..., None], rgb, foreground)


def _lab(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)


def match_histogram(foreground: np.ndarray, mask: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Give the masked pixels of ``foreground`` the distribution of the background's in each channel, on ``background``.

    The background's distribution is that outside ``mask``; where the mask covers everything nothing is matched.
    """
    from skimage.exposure import match_histograms  # not in every Python that runs ComfyUI

    if not mask.any() or mask.all():
        return copy_paste(background, foreground, mask)
    pixels = match_histograms(foreground[mask][:, None], background[~mask][:, None], channel_axis=-1)
    result = background.copy()
    result[mask] = np.rint(pixels[:, 0]).astype(np.uint8)
    return result


def poisson(background: np.ndarray, foreground: np.ndarray, mask: np.ndarray, surroundings: bool = True) -> np.ndarray:
    """Gradient-domain composite (Perez 2003, Poisson Image Editing), bit-exact outside ``mask``.

    ``surroundings``: ``foreground`` shows what is around the object, so that its step across the mask's rim counts.
    Without it, in a cut-out, the object continues the background.
    """
    if not mask.any():
        return background.copy()
    values = solve_poisson(background.astype(float), foreground.astype(float), mask, surroundings)
    return copy_paste(background, np.rint(np.clip(values, 0, 255)).astype(np.uint8), mask)


def solve_poisson(
    background: np.ndarray, foreground: np.ndarray, mask: np.ndarray, surroundings: bool = True
) -> np.ndarray:
    """Solve the discrete Poisson equation (Perez 2003, eq. 7): float H x W x 3, ``foreground`` outside the mask.

    Each pixel of the mask differs from its four neighbors as in ``foreground``, in the mean over them; neighbors
    outside the mask are those of ``background``. The picture's border is free. A mask of the whole picture, where any
    brightness would do, gets the background's mean. The correction of the foreground is solved for: it is a membrane
    that spans the differences at the rim.
    """
    if mask.all():
        return foreground + (background - foreground).mean(axis=(0, 1))
    count = int(mask.sum())
    numbers = np.zeros(mask.shape, int)
    numbers[mask] = np.arange(count)
    degrees, differences, rows, columns = np.zeros(count), np.zeros((count, 3)), [], []
    for here, there in NEIGHBORS:
        inside, rim = mask[here] & mask[there], mask[here] & ~mask[there]
        degrees[numbers[here][mask[here]]] += 1
        rows.append(numbers[here][inside])
        columns.append(numbers[there][inside])
        differences[numbers[here][rim]] += background[there][rim] - foreground[there if surroundings else here][rim]
    row, column = np.concatenate(rows), np.concatenate(columns)
    neighbors = csc_array((np.ones(len(row)), (row, column)), (count, count))
    # no pivots, and a symmetric order: the matrix is symmetric and positive definite
    options = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0, "options": {"SymmetricMode": True}}
    values = foreground.copy()
    values[mask] += splu(csc_array(diags_array(degrees) - neighbors), **options).solve(differences)
    return values


def change_light(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put the picture under another light by a random exposure, white balance and contrast.

    Exposure 0.5 to 2, white balance 0.7 to 1.4 for each channel. Gains act on linear light (gamma 2.2), the contrast is
    a gamma of 0.7 to 1.4. uint8 in, uint8 out.
    """
    radiance = to_radiance(image)
    gains = np.exp(rng.uniform(np.log(0.5), np.log(2)) + rng.uniform(np.log(0.7), np.log(1.4), 3))
    values = np.clip(radiance * gains.astype(np.float32), 0, 1) ** (np.exp(rng.uniform(np.log(0.7), np.log(1.4))) / 2.2)
    return np.rint(255 * values).astype(np.uint8)


def carry_change(
    before: np.ndarray,
    after: np.ndarray,
    small_mask: np.ndarray,
    picture: np.ndarray,
    mask: np.ndarray,
    sigma: float = CHANGE_SIGMA,
    shadow: bool = False,
) -> np.ndarray:
    """Change the light of ``picture`` in ``mask`` as it changes from ``before`` to ``after``, and keep its detail.

    ``before``, ``after`` uint8 R x R x 3 and ``small_mask`` bool R x R show the same square as ``picture`` uint8 S x S
    x 3 and ``mask`` bool S x S. The change is the ratio of their radiance, blurred by ``sigma`` (px at 512) within
    ``small_mask``: another exposure or color of the light multiplies it, and what varies faster is the texture that a
    network invents, which would look like a relief. ``shadow``: all channels are darkened alike, nothing gets brighter.
    Returns uint8 S x S x 3.
    """
    if not small_mask.any():
        return picture.copy()
    weight, sigma_px = small_mask.astype(np.float32), scale_length(sigma, small_mask.shape)

    def blur(radiance: np.ndarray | float) -> np.ndarray:
        values = np.broadcast_to(radiance, (*weight.shape, 3)) * weight[..., None]
        return cv2.GaussianBlur(values, (0, 0), sigma_px)

    # farther from the mask than the blur reaches nothing is known, and nothing is changed
    floor = blur(np.float32(DARK)) + 1e-6
    gain = (blur(to_radiance(after)) + floor) / (blur(to_radiance(before)) + floor)
    if shadow:
        gain = np.broadcast_to(np.minimum(gain.mean(2, keepdims=True), 1), gain.shape)
    side, result = picture.shape[0], picture.copy()
    gains = cv2.resize(gain, (side, side), interpolation=cv2.INTER_LINEAR)[mask]
    result[mask] = to_values(to_radiance(picture[mask]) * gains)
    return result


def to_radiance(image: np.ndarray) -> np.ndarray:
    """uint8 to linear light, float32 in [0, 1] (gamma 2.2)."""
    return (image.astype(np.float32) / 255) ** 2.2


def to_values(radiance: np.ndarray) -> np.ndarray:
    """The inverse of ``to_radiance``, clipped and rounded."""
    return np.rint(255 * np.clip(radiance, 0, 1) ** (1 / 2.2)).astype(np.uint8)


def place(
    foreground: np.ndarray, mask: np.ndarray, box: Sequence[float], width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Place a cut-out on an empty canvas: as large as fits into ``box``, centered, at the bottom, aspect kept.

    ``box`` is (x0, y0, x1, y1) in pixels of the canvas; parts outside the canvas are cut off. Returns the canvas (uint8
    ``height`` x ``width`` x 3, black outside the object) and the object's mask. Raises UserError if no pixel of the
    object is on the canvas.
    """
    x0, y0, x1, y1 = bounding_box(mask)
    patch, alpha = foreground[y0:y1, x0:x1], mask[y0:y1, x0:x1].astype(np.float32)
    if not (box[2] > box[0] and box[3] > box[1]):
        raise UserError(f"box {tuple(box)} has no area; give x0, y0, x1, y1 with x0 < x1 and y0 < y1")
    scale = min((box[2] - box[0]) / (x1 - x0), (box[3] - box[1]) / (y1 - y0))
    w, h = max(1, round(scale * (x1 - x0))), max(1, round(scale * (y1 - y0)))
    if max(w, h) > LARGEST_PLACED * max(width, height):
        raise UserError(f"box {tuple(box)} makes the object {w} x {h} in {width} x {height} pixels: give a smaller one")
    # weighted by the mask, so that the foreground's background does not bleed into the rim
    weight = resize(alpha, w, h)
    color = resize(patch * alpha[..., None], w, h) / np.maximum(weight, 1e-3)[..., None]
    left, top = round((box[0] + box[2] - w) / 2), round(box[3]) - h
    canvas_part, patch_part = zip(_overlap(top, h, height), _overlap(left, w, width), strict=True)
    canvas, canvas_mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), bool)
    canvas_mask[canvas_part] = weight[patch_part] > 0.5
    if not canvas_mask.any():
        size = f"{width} x {height}"
        raise UserError(f"box {tuple(box)} shows nothing of the object in a {size} image; move or enlarge it")
    canvas[canvas_part] = np.clip(np.rint(color[patch_part]), 0, 255)
    return canvas * canvas_mask[..., None], canvas_mask


def _overlap(start: int, length: int, limit: int) -> tuple[slice, slice]:
    """The overlap of [start, start + length) and [0, limit) as two slices: of the limit and of the interval."""
    low, high = min(max(start, 0), limit), min(max(start + length, 0), limit)
    return slice(low, high), slice(low - start, high - start)
