"""The inputs of Paint by Example: exemplar and augmentation, extended box, hole of arbitrary shape, crop.

As in the released code of Yang 2022 (arXiv 2211.13227). Boxes are (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.
Pictures are uint8 H x W x 3, masks bool H x W, True = to be painted. All randomness comes from the argument ``rng``.
"""

import math

import cv2
import numpy as np

from harmony.pixels.images import Crop, resize
from harmony.pixels.masks import bounding_box, box_mask, scale_length

Box = tuple[int, int, int, int]

PAD = 10  # px at 512: margin of the exemplar around its box
EXTENSION = 0.4  # largest share of the free space by which a side of the box moves outwards
SHRINK = 0.6  # largest share of the smallest margin by which the square shrinks
CURVE = np.arange(1, 19) / 20  # parameters at which a curve is sampled: 0.05, 0.10, ..., 0.90
JITTER = 5  # px at 512: largest displacement of a sampled point
SHAPE_SHARE = 0.5  # share of holes of arbitrary shape; the others are the extended box
TOWER = 224  # px: side of the exemplar for which the lengths of the augmentation are given


# --- the exemplar


def cut_out(image: np.ndarray, mask: np.ndarray, pad: float = PAD) -> np.ndarray:
    """Cut out the instance's box with up to ``pad`` px (at 512) around it; no randomness.

    ``image`` and ``mask`` have the photograph's full size: an exemplar from a small square would be blurred. The
    released code pads by 10 px of any photograph; here the margin grows with the photograph.
    """
    height, width = mask.shape
    x0, y0, x1, y1 = bounding_box(mask)
    margin = round(scale_length(pad, mask.shape))
    return image[max(0, y0 - margin) : min(height, y1 + margin), max(0, x0 - margin) : min(width, x1 + margin)].copy()


def exemplar(part: np.ndarray, size: int = TOWER) -> np.ndarray:
    """The cut-out squashed to ``size`` x ``size``, the encoder's input in training and at test time."""
    return resize(part, size, size)


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Augment an exemplar: mirror (probability 0.5), rotation (0.5), box blur (0.3) and affine jitter (0.3).

    Rotation by up to 20 degrees, blur of 3 to 7 px, jitter by up to 50 px, lengths at a side of 224 px. The jitter
    stands for the released elastic transform, of which only the affine part is visible: its displacement field (alpha
    1, sigma 50) stays far below a pixel.
    """
    side = image.shape[0]
    scale = side / TOWER
    if rng.random() < 0.5:
        image = image[:, ::-1]
    if rng.random() < 0.5:
        rotation = cv2.getRotationMatrix2D(((side - 1) / 2, (side - 1) / 2), rng.uniform(-20, 20), 1)
        image = warp(image, rotation)
    if rng.random() < 0.3:
        taps = max(1, round(scale * rng.choice([3, 5, 7])))
        image = cv2.blur(image, (taps, taps))
    if rng.random() < 0.3:
        third = side / 3
        anchors = side / 2 + np.array([[third, third], [third, -third], [-third, -third]])
        targets = anchors + rng.uniform(-50, 50, anchors.shape) * scale
        image = warp(image, cv2.getAffineTransform(anchors.astype(np.float32), targets.astype(np.float32)))
    return np.ascontiguousarray(image)


def warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return cv2.warpAffine(np.ascontiguousarray(image), matrix, image.shape[1::-1], borderMode=cv2.BORDER_REFLECT_101)


# --- the hole


def extend_box(box: Box, width: int, height: int, rng: np.random.Generator) -> Box:
    """Move each side of a box outwards by a random whole number of pixels in [0, int(0.4 x its free space)]."""
    x0, y0, x1, y1 = box
    left, top, right, bottom = (
        int(rng.integers(int(EXTENSION * space) + 1)) for space in (x0, y0, width - x1, height - y1)
    )
    return x0 - left, y0 - top, x1 + right, y1 + bottom


def control_points(box: Box, extended_box: Box) -> list[np.ndarray]:
    """Quadratic Bezier control polygons, 3 x 2 each, of the sides top, right, bottom, left, clockwise.

    A curve ends in two corners of the box; its middle control point is the middle of the extended box's side.
    """
    x0, y0, x1, y1 = box
    left, top, right, bottom = extended_box
    center_x, center_y = (x0 + x1) / 2, (y0 + y1) / 2
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    middles = [(center_x, top), (right, center_y), (center_x, bottom), (left, center_y)]
    return [np.array([corners[i], middles[i], corners[(i + 1) % 4]], dtype=float) for i in range(4)]


def bezier(points: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Points N x 2 of the quadratic curve with control points 3 x 2 at parameters N."""
    t = t[:, None]
    return (1 - t) ** 2 * points[0] + 2 * t * (1 - t) * points[1] + t**2 * points[2]


def draw_shape_mask(
    box: Box, extended_box: Box, width: int, height: int, rng: np.random.Generator, jitter: float = JITTER
) -> np.ndarray:
    """A random shape, bool H x W: the area inside four curves, each sampled at 18 points that are then jittered.

    ``jitter`` in px at 512; the released code moves the points by 5 px of any photograph.
    """
    reach = round(scale_length(jitter, (height, width)))
    outline = np.concatenate([bezier(points, CURVE) for points in control_points(box, extended_box)])
    outline = outline + rng.integers(-reach, reach + 1, outline.shape)
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [np.rint(outline).astype(np.int32)], 1)
    return mask.astype(bool)


def draw_hole(
    box: Box, extended_box: Box, width: int, height: int, rng: np.random.Generator, shape_share: float = SHAPE_SHARE
) -> np.ndarray:
    """A hole, bool H x W: an arbitrary shape with probability ``shape_share``, else the extended box."""
    if rng.random() < shape_share:
        return draw_shape_mask(box, extended_box, width, height, rng)
    return box_mask(extended_box, width, height)


# --- the crop


def draw_crop(extended_box: Box, width: int, height: int, rng: np.random.Generator) -> Crop | None:
    """A random square that contains the extended box; None if no square does or if the picture is a square.

    Its side is the picture's short side, reduced on all sides equally by up to 60 % of the smallest margin.
    """
    if width == height:
        return None
    if width < height:
        x0, y0, x1, y1 = extended_box
        crop = draw_crop((y0, x0, y1, x1), height, width, rng)
        return crop and Crop(crop.y0, crop.x0, crop.side)
    x0, y0, x1, y1 = extended_box
    low, high = max(0, x1 - height), min(width, x0 + height) - height
    if low >= high:
        return None
    left = int(rng.integers(low, high + 1))
    margin = min(x0 - left, left + height - x1, y0, height - y1)
    shrink = int(rng.integers(math.floor(SHRINK * margin) + 1))
    return Crop(left + shrink, shrink, height - 2 * shrink)
