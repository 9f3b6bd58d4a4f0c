"""Inserting one object into one photograph: crop, fill, paste back; bit-exact outside the hole.

The photograph is cropped to a square around the hole, a method works on it at its own resolution, and what it made is
put back into the hole alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harmony.core.errors import UserError
from harmony.methods.method import Composite, Method, seeds_of
from harmony.pixels.composites import copy_paste, paste_back, transfer_change
from harmony.pixels.images import Crop, crop_resize, paste_crop, square_around
from harmony.pixels.masks import TEST_RADIUS, bounding_box, box_mask, dilate, scale_length

CONTEXT = 1.6  # side of the working square relative to the hole's longer side


@dataclass(frozen=True)
class Result:
    """``image``: the photograph with the instance in it, bit-exact outside ``hole``; ``raw``: the method's square;
    ``composite``: plain copy and paste; ``crop``: where the square lies.
    """

    image: np.ndarray
    raw: np.ndarray
    composite: np.ndarray
    hole: np.ndarray
    crop: Crop


@dataclass(frozen=True)
class Insertion:
    """A ``square`` cut out of a photograph, and the way back into it.

    ``background``, ``composite`` (plain copy and paste) uint8 H x W x 3; ``hole`` bool H x W; the square lies at
    ``crop``.
    """

    square: Composite
    background: np.ndarray
    composite: np.ndarray
    hole: np.ndarray
    crop: Crop

    def paste(self, raw: np.ndarray, feather: float = 0, detail: bool = False) -> Result:
        """The photograph with ``raw`` (uint8 R x R x 3) in the hole; ``feather`` in pixels blends inwards.

        ``detail``: what a method changed of the composite is done to the composite in its full size, instead of
        enlarging what it made.
        """
        pixels = raw
        if detail:
            whole = crop_resize(self.composite, self.crop, self.crop.side)
            pixels = transfer_change(self.square.instance, raw, self.square.mask, whole)
        image = paste_back(paste_crop(self.background, pixels, self.crop), self.background, self.hole, feather)
        return Result(image, raw, self.composite, self.hole, self.crop)


def cut(
    side: int,
    background: np.ndarray,
    foreground: np.ndarray,
    mask: np.ndarray,
    region: np.ndarray | None = None,
    radius: float = TEST_RADIUS,
    **words,
) -> Insertion:
    """The square of ``side`` pixels in which the masked object of ``foreground`` goes into ``background``.

    ``background``, ``foreground`` uint8 H x W x 3 and ``mask`` bool H x W share one size (see ``composites.place`` for
    a cut-out of another size). The hole is the mask dilated by ``radius`` (px at 512 of the working square), joined by
    the optional ``region`` in which a method may also repaint (for a shadow). ``words``: further fields of
    ``Composite``. UserError for an empty mask or sizes that differ.
    """
    check_sizes(background, foreground=foreground, mask=mask, region=region)
    height, width = background.shape[:2]
    composite = copy_paste(background, foreground, mask)
    crop = working_square(mask, region)
    image, instance, small = (crop_resize(a, crop, side) for a in (background, composite, mask))
    if not small.any():
        raise UserError(
            f"the object is too small: it vanishes at the backbone's {side} px; enlarge it or take a larger backbone"
        )
    hole = dilate(mask, math.ceil(scale_length(radius, (crop.side,))))  # the rule at the photograph's resolution
    if region is not None:
        hole |= region
    hole &= box_mask(crop.clip(width, height), width, height)
    square = Composite(
        image, instance, small, crop_resize(hole, crop, side), crop=crop, size=(width, height), naive=instance, **words
    )
    return Insertion(square, background, composite, hole, crop)


def insert(method: Method, insertions: Sequence[Insertion], seed: int = 0, feather: float = 0) -> list[Result]:
    """Fill the squares by ``method`` and paste them back; each has the noise that it has alone, whatever stands beside
    it.
    """
    squares = [insertion.square for insertion in insertions]
    raws = method.fill(squares, seeds_of(seed, [0] * len(squares)))
    return [i.paste(raw, feather, method.carries_detail) for i, raw in zip(insertions, raws, strict=True)]


def working_square(mask: np.ndarray, region: np.ndarray | None = None) -> Crop:
    """The square of the photograph that a method works on."""
    height, width = mask.shape
    return square_around(bounding_box(mask if region is None else mask | region), width, height, context=CONTEXT)


def check_sizes(background: np.ndarray, **others: np.ndarray | None) -> None:
    """UserError unless ``others`` (pictures and masks by name, None left out) are as large as the background."""
    height, width = background.shape[:2]
    for name, array in others.items():
        if array is not None and array.shape[:2] != (height, width):
            sizes = f"{array.shape[1]} x {array.shape[0]} but the background is {width} x {height}"
            raise UserError(f"{name} is {sizes}: give box=x0,y0,x1,y1 or resize it")
