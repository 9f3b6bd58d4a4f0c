"""Masks of instances and holes. M is the instance, M_e the hole that contains it, True inside."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from scipy.ndimage import binary_fill_holes

from harmony.core.errors import UserError
from harmony.pixels.images import open_image

OBJECT = 122  # gray values above this are the object (lossy tools do not keep exactly 0 and 255)
VOID = 255  # the label of pixels that belong to nothing (PASCAL VOC)
COLORED = 48  # difference of a pixel's channels from which on it is a color rather than a shade of gray
CHANGE = 4, 10  # levels of mean difference around a pixel: from which on it may be, and is, changed
REFERENCE_SIDE = 512  # lengths in pixels are given for this image side and scaled to the actual one
TEST_RADIUS = 16  # px at 512: dilation of the hole at test time
TRAIN_RADIUS = 32  # px at 512: largest dilation of the hole in training
RULES = ("instance", "dilate", "train", "backbone")
BACKBONE_MIX = {"instance": 0.15, "dilate": 0.3, "box": 0.2, "elsewhere": 0.15, "full": 0.2}


def scale_length(length: float, shape: Sequence[int]) -> float:
    """Scale a length in pixels at a side of 512 to an image of ``shape``, by its longer side."""
    return length / REFERENCE_SIDE * max(shape[:2])


# --- files


class EmptyMaskError(UserError):
    """A mask without a pixel of an object."""


def read_mask(
    path: str | Path, size: tuple[int, int] | None = None, resize: bool = False, empty: bool = False
) -> np.ndarray:
    """Read a mask file as bool H x W of ``size`` = (width, height); None: of the file's own size.

    ``resize``: a mask of another size is resized by nearest (Open Images stores masks in other sizes than the images);
    otherwise it is an error. ``empty``: the mask may be empty (a shadow may fall outside the picture). Raises UserError
    for a mask that is missing, undecodable, of the wrong size, or does not say what is the object; EmptyMaskError for
    an empty one.
    """
    image = open_image(path, "mask")
    size = size or image.size
    if image.size != size and not resize:
        mask_size, image_size = (f"{w} x {h}" for w, h in (image.size, size))
        raise UserError(f"mask {path} is {mask_size} but its image is {image_size}; save the mask at the image's size")
    values = find_object(image, path)
    if image.size != size:
        values = resize_mask(values, *size)
    if not (values.any() or empty):
        raise EmptyMaskError(f"mask {path} is empty; paint the object white (above {OBJECT} of 255, on black)")
    return values


def find_object(image: Image.Image, path: str | Path) -> np.ndarray:
    """Where a decoded mask is bright and opaque, or has the index of an object, bool H x W. ``path`` is for errors."""
    if image.mode == "1" and not image.has_transparency_data:
        return np.asarray(image)
    if image.mode == "P" and (colors := read_palette(image)) is not None:
        return find_object_indices(colors, path)[np.asarray(image)]
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        return (values > OBJECT * 257) & (values != image.info.get("transparency", -1))
    if image.mode in ("I", "F"):
        raise UserError(f"mask {path} holds numbers of no known scale (mode {image.mode}); save it as 8-bit gray")
    if image.has_transparency_data:
        opaque_part = Image.new("RGB", image.size)
        opaque_part.paste(image.convert("RGB"), mask=image.convert("RGBA").getchannel("A"))
        image = opaque_part
    if image.mode != "L":
        image = to_gray(image if image.mode == "RGB" else image.convert("RGB"), path)
    return find_white(image, path)


def find_white(image: Image.Image, path: str | Path) -> np.ndarray:
    """Where a gray mask is bright, bool H x W.

    UserError where nothing is bright but VOID, and more is dark than that: then the dark values are labels.
    """
    counts = np.array(image.histogram())
    if not counts[OBJECT + 1 : VOID].any() and counts[1 : OBJECT + 1].sum() > counts[VOID] > 0:
        raise UserError(f"mask {path} seems to hold labels, with {VOID} for none; save the object as white on black")
    return np.asarray(image) > OBJECT


def to_gray(image: Image.Image, path: str | Path) -> Image.Image:
    """The luminance of an RGB mask. UserError for colors that are not bright: they may be labels of objects."""
    gray = image.convert("L")
    red, green, blue = image.split()
    highest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    lowest = ImageChops.darker(ImageChops.darker(red, green), blue)
    is_colored = np.asarray(ImageChops.subtract(highest, lowest)) >= COLORED
    if (is_colored & (np.asarray(gray) <= OBJECT)).any():
        raise UserError(f"mask {path} has dark colors, so that the object is not clear; save it as white on black")
    return gray


def read_palette(image: Image.Image) -> np.ndarray | None:
    """The colors of a palette, 256 x RGBA, black where it ends; None for a palette of grays: that is a gray picture."""
    image = image.copy()
    image.apply_transparency()
    entries = np.reshape(image.getpalette("RGBA"), (-1, 4))
    colors = np.tile((0, 0, 0, 255), (256, 1))
    colors[: len(entries)] = entries
    return colors if np.ptp(colors[:, :3], axis=1).max() >= COLORED else None


def find_object_indices(colors: np.ndarray, path: str | Path) -> np.ndarray:
    """The indices of a palette that are an object, bool of 256: any but 0, VOID and those that are transparent.

    UserError for a palette that does not begin with black, where index 0 need not be the ground.
    """
    if colors[0, :3].max() >= COLORED:
        raise UserError(f"mask {path} has a palette whose index 0 is not black; save it as white on black")
    indices = np.arange(256)
    return (indices != 0) & (indices != VOID) & (colors[:, 3] > OBJECT)


# --- geometry


def resize_mask(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize a bool mask to height x width by nearest."""
    return cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)


def dilate(mask: np.ndarray, radius_px: int) -> np.ndarray:
    """Dilate ``mask`` by ``radius_px`` pixels (Euclidean)."""
    if radius_px <= 0 or not mask.any():
        return mask.copy()
    # a distance transform costs the same for every radius; a structuring element of 65 x 65 does not
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= radius_px + 1e-3


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest (x0, y0, x1, y1) around ``mask``, x1 and y1 exclusive. Raises UserError if it is empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        raise UserError("the mask is empty; it must mark at least one pixel")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def move_mask(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The shape of ``mask`` at 50 to 100 % of its size somewhere else in the picture, bool H x W."""
    x0, y0, x1, y1 = bounding_box(mask)
    scale = rng.uniform(0.5, 1)
    shape = resize_mask(mask[y0:y1, x0:x1], max(1, round(scale * (x1 - x0))), max(1, round(scale * (y1 - y0))))
    if not shape.any():  # nothing is left of what is thinner than a pixel
        shape[:] = True
    top, left = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(mask.shape, shape.shape, strict=True))
    moved = np.zeros_like(mask)
    moved[top : top + shape.shape[0], left : left + shape.shape[1]] = shape
    return moved


def shadow_region(mask: np.ndarray, radius_px: int) -> np.ndarray:
    """Where an object that stands on something may cast a shadow beside itself: around its lower third, bool H x W.

    Nowhere if the picture's lower edge cuts the object off: what it stands on is not in the picture.
    """
    x0, y0, x1, y1 = bounding_box(mask)
    if y1 == len(mask):
        return np.zeros_like(mask)
    lower_part = mask.copy()
    lower_part[: y1 - max(1, (y1 - y0) // 3)] = False
    return dilate(lower_part, radius_px)


def find_change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where two pictures of one size differ by more than JPEG's errors, gaps closed and specks left out, bool H x W."""
    from skimage.filters import apply_hysteresis_threshold  # not in every Python that runs ComfyUI

    difference = before.astype(np.float32) - after  # with its sign: JPEG's errors have a mean of 0
    mean = cv2.GaussianBlur(difference, (0, 0), max(1.0, scale_length(3, before.shape)))
    mask = apply_hysteresis_threshold(np.abs(mean).max(axis=2), *CHANGE).astype(np.uint8)
    gap, speck = (2 * max(1, round(scale_length(radius, before.shape))) + 1 for radius in (6, 4))
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((gap, gap), np.uint8))
    return binary_fill_holes(cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((speck, speck), np.uint8)))


def inscribed_radius(mask: np.ndarray) -> float:
    """The radius in pixels of the largest disc that ``mask`` holds: half of how thick the object is."""
    x0, y0, x1, y1 = bounding_box(mask)
    part = np.pad(mask[y0:y1, x0:x1], 1).astype(np.uint8)  # beyond the picture there is no object
    return float(cv2.distanceTransform(part, cv2.DIST_L2, cv2.DIST_MASK_PRECISE).max())


def box_mask(box: Sequence[float], w: int, h: int) -> np.ndarray:
    """Bool h x w, True on every pixel that (x0, y0, x1, y1) touches."""
    mask = np.zeros((h, w), dtype=bool)
    x0, y0 = (max(int(np.floor(v)), 0) for v in box[:2])
    x1, y1 = (max(int(np.ceil(v)), 0) for v in box[2:])
    mask[y0:y1, x0:x1] = True
    return mask


def feather(mask: np.ndarray, radius: float) -> np.ndarray:
    """Soft mask, float32 in [0, 1]: 0 outside ``mask``, rising from its rim inwards to 1 at depth ``radius`` px."""
    if radius <= 0 or mask.all():  # a mask of the whole image has no rim
        return mask.astype(np.float32)
    depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.clip(depth / (radius + 1), 0, 1)


# --- the latent grid


def to_latent(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """Mask B x 1 x H x W to B x 1 x h x w by nearest, as Stable Diffusion inpainting does: every factor-th pixel."""
    return F.interpolate(mask, size=(mask.shape[-2] // factor, mask.shape[-1] // factor), mode="nearest")


def coverage(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """Share in [0, 1] of each latent cell that the mask covers: B x 1 x H x W to B x 1 x h x w."""
    return F.avg_pool2d(mask, factor)


# --- holes


def hole(
    mask: np.ndarray, rule: str, rng: np.random.Generator | None = None, radius: float = TEST_RADIUS
) -> np.ndarray:
    """The hole M_e, bool H x W, for the instance mask M: the pixels that the model may repaint.

    ``instance``  M itself (Liu 2025, eq. 9 and 10, read literally)
    ``dilate``    M dilated by ``radius`` px at 512 (the default for testing, not random)
    ``train``     M dilated by a random 0..32 px at 512 with probability 0.7, else the bounding box
    ``backbone``  the mixture BACKBONE_MIX for training the inpainting backbone, with holes elsewhere and of the whole
                  image, which make the inpainting network a text-to-image model too
    M_e contains M, except for the ``backbone`` holes elsewhere. The random rules need ``rng``.
    """
    match rule:
        case "instance":
            return mask.copy()
        case "dilate":
            return dilate(mask, round(scale_length(radius, mask.shape)))
        case "train":
            return _dilate_at_random(mask, rng) if rng.random() < 0.7 else _box_hole(mask)
        case "backbone":
            return _backbone_hole(mask, rng)
        case _:
            raise UserError(f"hole rule '{rule}' is unknown; use one of {', '.join(RULES)}")


def _box_hole(mask: np.ndarray) -> np.ndarray:
    return box_mask(bounding_box(mask), mask.shape[1], mask.shape[0])


def _dilate_at_random(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return dilate(mask, round(scale_length(rng.uniform(0, TRAIN_RADIUS), mask.shape)))


def _backbone_hole(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    match rng.choice(list(BACKBONE_MIX), p=list(BACKBONE_MIX.values())):
        case "instance":
            return mask.copy()
        case "dilate":
            return _dilate_at_random(mask, rng)
        case "box":
            return _box_hole(mask)
        case "elsewhere":
            return _draw_rectangle(mask.shape, rng) if rng.random() < 0.5 else draw_stroke(mask.shape, rng)
        case _:
            return np.ones_like(mask)


def _draw_rectangle(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A rectangle anywhere, its sides 15 % to 60 % of the image's."""
    h, w = (max(1, round(rng.uniform(0.15, 0.6) * length)) for length in shape)
    y, x = rng.integers(0, shape[0] - h + 1), rng.integers(0, shape[1] - w + 1)
    return box_mask((x, y, x + w, y + h), shape[1], shape[0])


def draw_stroke(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A free-form blob anywhere: one thick brush stroke through 3 to 6 random points."""
    points = (rng.random((rng.integers(3, 7), 2)) * (shape[1], shape[0])).astype(np.int32)
    thickness = max(1, round(rng.uniform(0.06, 0.2) * max(shape)))
    return cv2.polylines(np.zeros(shape, np.uint8), [points], isClosed=False, color=1, thickness=thickness).astype(bool)
