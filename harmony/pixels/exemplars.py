"""What Paint by Example sees: the exemplar and its augmentation, the extended box, the mask of any shape, the crop.

After the released code of Yang 2022. Boxes are (x0, y0, x1, y1) in pixels, x1 and y1 exclusive. Pictures are uint8
H x W x 3, masks bool H x W, True = to be painted. Everything random comes from the ``rng`` that is handed in.
"""

import math

import cv2
import numpy as np

from harmony.pixels.images import Crop, resize
from harmony.pixels.masks import bounding_box, box_mask, scaled

Box = tuple[int, int, int, int]

PAD = 10  # px at 512: surroundings that the exemplar keeps around its box
EXTENSION = 0.4  # largest share of the free space by which a side of the box moves outwards
SHRINK = 0.6  # largest share of the smallest margin by which the square shrinks
CURVE = np.arange(1, 19) / 20  # where a curve is sampled: 0.05, 0.10, ..., 0.90
JITTER = 5  # px at 512: each sampled point moves by at most so much
SHAPED = 0.5  # share of masks of arbitrary shape; the others are the extended box
TOWER = 224  # side at which the lengths of the augmentation are given


# --- the exemplar


def cut_out(image: np.ndarray, mask: np.ndarray, pad: float = PAD) -> np.ndarray:
    """The instance's box with up to ``pad`` px (at 512) around it; no randomness.

    ``image`` and ``mask`` are the photograph's own: cut from a small square, an exemplar would be blurred.
    """
    height, width = mask.shape
    x0, y0, x1, y1 = bounding_box(mask)
    margin = round(scaled(pad, mask.shape))
    return image[max(0, y0 - margin) : min(height, y1 + margin), max(0, x0 - margin) : min(width, x1 + margin)].copy()


def exemplar(part: np.ndarray, size: int = TOWER) -> np.ndarray:
    """What was cut out, squashed to ``size`` x ``size``: what the encoder sees, in training and at test time."""
    return resize(part, size, size)


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror (p 0.5), turn by up to 20 degrees (0.5), box blur of 3 to 7 px (0.3), affine jitter by up to 50 px (0.3).

    Lengths hold at 224 px. The jitter is what the released elastic transform visibly does: its displacement field
    (alpha 1, sigma 50) stays far below a pixel.
    """
    side = image.shape[0]
    scale = side / TOWER
    if rng.random() < 0.5:
        image = image[:, ::-1]
    if rng.random() < 0.5:
        turn = cv2.getRotationMatrix2D(((side - 1) / 2, (side - 1) / 2), rng.uniform(-20, 20), 1)
        image = warped(image, turn)
    if rng.random() < 0.3:
        taps = max(1, round(scale * rng.choice([3, 5, 7])))
        image = cv2.blur(image, (taps, taps))
    if rng.random() < 0.3:
        third = side / 3
        anchors = side / 2 + np.array([[third, third], [third, -third], [-third, -third]])
        moved = anchors + rng.uniform(-50, 50, anchors.shape) * scale
        image = warped(image, cv2.getAffineTransform(anchors.astype(np.float32), moved.astype(np.float32)))
    return np.ascontiguousarray(image)


def warped(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return cv2.warpAffine(np.ascontiguousarray(image), matrix, image.shape[1::-1], borderMode=cv2.BORDER_REFLECT_101)


# --- what is painted over


def extended_box(box: Box, width: int, height: int, rng: np.random.Generator) -> Box:
    """Each side moved outwards by a whole number of pixels in [0, int(0.4 x its free space)]."""
    x0, y0, x1, y1 = box
    left, top, right, bottom = (
        int(rng.integers(int(EXTENSION * space) + 1)) for space in (x0, y0, width - x1, height - y1)
    )
    return x0 - left, y0 - top, x1 + right, y1 + bottom


def control_points(box: Box, extended: Box) -> list[np.ndarray]:
    """Quadratic Bezier control polygons, 3 x 2 each, of the sides top, right, bottom, left, clockwise.

    A curve ends in the corners of the box; its middle point lies half-way along the side, on the extended box's side.
    """
    x0, y0, x1, y1 = box
    left, top, right, bottom = extended
    across, down = (x0 + x1) / 2, (y0 + y1) / 2
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    middles = [(across, top), (right, down), (across, bottom), (left, down)]
    return [np.array([corners[i], middles[i], corners[(i + 1) % 4]], dtype=float) for i in range(4)]


def bezier(points: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Points N x 2 of the quadratic curve with control points 3 x 2 at parameters N."""
    t = t[:, None]
    return (1 - t) ** 2 * points[0] + 2 * t * (1 - t) * points[1] + t**2 * points[2]


def shaped_mask(
    box: Box, extended: Box, width: int, height: int, rng: np.random.Generator, jitter: float = JITTER
) -> np.ndarray:
    """Bool H x W: the closed outline of four curves, each sampled 18 times and jittered."""
    reach = round(scaled(jitter, (height, width)))
    outline = np.concatenate([bezier(points, CURVE) for points in control_points(box, extended)])
    outline = outline + rng.integers(-reach, reach + 1, outline.shape)
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [np.rint(outline).astype(np.int32)], 1)
    return mask.astype(bool)


def painted_mask(
    box: Box, extended: Box, width: int, height: int, rng: np.random.Generator, shaped: float = SHAPED
) -> np.ndarray:
    """An arbitrary shape with probability ``shaped``, else the extended box."""
    if rng.random() < shaped:
        return shaped_mask(box, extended, width, height, rng)
    return box_mask(extended, width, height)


# --- where the square lies


def square_crop(extended: Box, width: int, height: int, rng: np.random.Generator) -> Crop | None:
    """A random square that holds the extended box; None = no square does, or the picture is one.

    It has the picture's short side, then shrinks on all sides alike by up to 60 % of the smallest margin.
    """
    if width == height:
        return None
    if width < height:
        x0, y0, x1, y1 = extended
        turned = square_crop((y0, x0, y1, x1), height, width, rng)
        return turned and Crop(turned.y0, turned.x0, turned.side)
    x0, y0, x1, y1 = extended
    low, high = max(0, x1 - height), min(width, x0 + height) - height
    if low >= high:
        return None
    left = int(rng.integers(low, high + 1))
    margin = min(x0 - left, left + height - x1, y0, height - y1)
    shrink = int(rng.integers(math.floor(SHRINK * margin) + 1))
    return Crop(left + shrink, shrink, height - 2 * shrink)
