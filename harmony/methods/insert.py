"""Inserts one object into one photograph: crop, fill, paste back; bit-exact outside the hole.

The photograph is cropped to a square around the hole, a method fills the square at its own resolution, and its output
is pasted back into the hole alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harmony.core.errors import UserError
from harmony.methods.method import Composite, Method, Seed, fingerprint, make_seeds
from harmony.pixels.color_profiles import from_srgb, to_srgb
from harmony.pixels.composites import CHANGE_SIGMA, carry_change, copy_paste, paste_back
from harmony.pixels.images import Crop, crop_resize, paste_crop, square_around
from harmony.pixels.masks import (
    TEST_RADIUS,
    bounding_box,
    box_mask,
    dilate,
    inscribed_radius,
    scale_length,
    shadow_region,
)

AUTO, FULL, NONE = ("auto", "full", "none")  # whether a photograph keeps its own detail
SMALLEST_RIM = 0.25  # of the usual rim: so that the hole of a thin object still has a place among the latents
SHADOW_SIGMA = 24  # px at a square of 512: below this length a change beside the object is texture, not shadow
SHADOW_RIM = 24  # px at a square of 512: over this length a shadow fades at the rim of its region
SHADOW_RADIUS = 48  # px at a square of 512: how far beside an object that was placed its shadow may fall
CONTEXT = 1.6  # side of the square relative to the longer side of the hole


@dataclass(frozen=True)
class Result:
    """A finished insertion.

    ``image``: the photograph with the instance in it, bit-exact outside ``hole``. ``output``: the square that the
    method returned. ``composite``: plain copy and paste. ``crop``: where the square lies.
    """

    image: np.ndarray
    output: np.ndarray
    composite: np.ndarray
    hole: np.ndarray
    crop: Crop


@dataclass(frozen=True)
class Insertion:
    """A ``square`` to fill, and what is needed to paste it back into its photograph.

    ``background``, ``composite`` (plain copy and paste) uint8 H x W x 3; ``mask``, ``hole`` bool H x W, and ``region``
    where the method may repaint beside the object, or None; ``crop``: where the square lies. ``profile``: the color
    profile of all pictures but the square, which a model sees in sRGB; None: they are the same.
    """

    square: Composite
    background: np.ndarray
    composite: np.ndarray
    mask: np.ndarray
    hole: np.ndarray
    region: np.ndarray | None
    crop: Crop
    profile: bytes | None = None

    def paste(self, output: np.ndarray, feather: float = 0, before: np.ndarray | None = None) -> Result:
        """Paste ``output`` (uint8 R x R x 3) into the hole; ``feather`` in pixels blends inwards.

        With ``before``, the composite by the same networks (``Method.relight``), the photograph keeps its detail and
        takes the change of light between both; without it the output is enlarged.
        """
        output, before = (None if y is None else from_srgb(y, self.profile) for y in (output, before))
        pixels = output if before is None else self.carry(before, output)
        image = paste_back(paste_crop(self.background, pixels, self.crop), self.background, self.hole, feather)
        return Result(image, output, self.composite, self.hole, self.crop)

    def carry(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """The composite's square at full size, S x S x 3, with the change of light between two squares R x R x 3."""
        rest = None if self.region is None else self.region & ~self.mask
        large, small = (
            [None if m is None else crop_resize(m, self.crop, n) for m in (self.mask, rest)]
            for n in (self.crop.side, len(after))
        )
        return carry(crop_resize(self.composite, self.crop, self.crop.side), *large, *small, before, after)


def cut(
    side: int | None,
    background: np.ndarray,
    foreground: np.ndarray,
    mask: np.ndarray,
    region: np.ndarray | None = None,
    radius: float = TEST_RADIUS,
    profile: bytes | None = None,
    **fields,
) -> Insertion:
    """Cut out the square of ``side`` pixels in which the masked object of ``foreground`` goes into ``background``.

    ``side`` None: as many pixels as the square has in the photograph.
    ``background``, ``foreground`` uint8 H x W x 3 and ``mask`` bool H x W have one size (see ``composites.place`` for a
    cut-out of another size). The hole is the mask dilated by ``radius`` (px at a square of 512; less for a thin object)
    and the optional ``region``, in which a method may also repaint (for a shadow). ``profile``: the color profile of
    both pictures; a square for a model, of a given ``side``, is in sRGB. ``fields``: further fields of ``Composite``.
    UserError for an empty mask, an object that is too thin for ``side``, or sizes that differ.
    """
    check_sizes(background, foreground=foreground, mask=mask, region=region)
    height, width = background.shape[:2]
    composite = copy_paste(background, foreground, mask)
    crop = find_square(mask, region)
    profile = None if side is None else profile
    side = side or crop.side
    square_background, instance = (to_srgb(crop_resize(a, crop, side), profile) for a in (background, composite))
    square_mask = crop_resize(mask, crop, side)
    hole = dilate(mask, find_rim(mask, crop, side, radius))
    if region is not None:
        hole |= region
    hole &= box_mask(crop.clip(width, height), width, height)
    places = {"crop": crop, "size": (width, height), "naive_composite": instance}
    square = Composite(square_background, instance, square_mask, crop_resize(hole, crop, side), **places, **fields)
    return Insertion(square, background, composite, mask, hole, region, crop, profile)


def insert(
    method: Method, insertions: Sequence[Insertion], seed: int = 0, feather: float = 0, detail: str = AUTO
) -> list[Result]:
    """Fill the squares by ``method`` and paste them back; the noise of each is independent of the others.

    ``detail``: ``full`` keeps the photographs' own detail and takes the change of light alone from the method, ``none``
    pastes what the method paints, ``auto`` is ``full`` where a square is larger than the method's.
    """
    squares = [insertion.square for insertion in insertions]
    seeds = make_seeds(seed, [0] * len(squares))
    results: dict[int, Result] = {}
    for keeps in (True, False):
        indices = [i for i, each in enumerate(insertions) if keeps_detail(method, each, detail) == keeps]
        parts = [[items[i] for i in indices] for items in (squares, seeds)]
        if not indices:
            continue
        outputs = method.relight(*parts) if keeps else [(None, output) for output in method.fill(*parts)]
        for i, (before, output) in zip(indices, outputs, strict=True):
            results[i] = insertions[i].paste(output, feather, before)
    return [results[i] for i in range(len(insertions))]


class Detailed(Method):
    """A method whose change of light is carried to the composites themselves, at the method's own resolution."""

    def __init__(self, method: Method):
        refuse_painting(method)
        self.method = method
        self.resolution, self.device = method.resolution, method.device
        self.wants, self.radius = method.wants, method.radius

    @property
    def fingerprint(self) -> str:
        return fingerprint("detailed", self.method.fingerprint, CHANGE_SIGMA, SHADOW_SIGMA, "mirrored, gray shadows")

    def describe(self) -> str:
        return f"{self.method.describe()}, the composite's own detail"

    def fill(self, composites: Sequence[Composite], seeds: Sequence[Seed]) -> list[np.ndarray]:
        return [
            carry(c.copy_paste(), c.mask, c.hole & ~c.mask, c.mask, c.hole & ~c.mask, before, after)
            for c, (before, after) in zip(composites, self.method.relight(composites, seeds), strict=True)
        ]


def carry(
    picture: np.ndarray,
    mask: np.ndarray,
    rest: np.ndarray | None,
    small_mask: np.ndarray,
    small_rest: np.ndarray | None,
    before: np.ndarray,
    after: np.ndarray,
) -> np.ndarray:
    """``picture``, uint8 S x S x 3, with the change of light between two squares R x R x 3.

    The object, ``mask``, takes it in large; ``rest``, what may be repainted beside it, as a shadow whose rim fades.
    """
    pixels = carry_change(before, after, small_mask, picture, mask)
    if rest is None:
        return pixels
    shaded = carry_change(before, after, small_rest, pixels, rest, SHADOW_SIGMA, shadow=True)
    return paste_back(shaded, pixels, mask | rest, scale_length(SHADOW_RIM, rest.shape))


def keeps_detail(method: Method, insertion: Insertion, detail: str) -> bool:
    """Whether the photograph keeps its own detail. UserError where it must and the method paints anew."""
    if method.resolution is None:  # it works on the photograph itself
        return False
    if detail == FULL:
        refuse_painting(method)
    is_larger = insertion.crop.side > len(insertion.square.mask)
    return method.relights and (detail == FULL or (detail == AUTO and is_larger))


def refuse_painting(method: Method) -> None:
    """UserError for a method that cannot keep an object's detail."""
    if not method.relights:
        raise UserError("detail=full: this method paints the object anew, so that its light alone cannot be taken")


def find_square(mask: np.ndarray, region: np.ndarray | None = None) -> Crop:
    """The square of the photograph that a method fills."""
    height, width = mask.shape
    return square_around(bounding_box(mask if region is None else mask | region), width, height, context=CONTEXT)


def find_shadow_region(mask: np.ndarray) -> np.ndarray | None:
    """Where an object that was placed in a photograph may cast a shadow, bool H x W; None: nowhere in the picture."""
    region = shadow_region(mask, round(scale_length(SHADOW_RADIUS, (find_square(mask).side,))))
    return region if region.any() else None


def find_rim(mask: np.ndarray, crop: Crop, side: int, radius: float) -> int:
    """The width of the hole's rim in pixels of the photograph: ``radius``, but no more than the object's own radius.

    UserError for an object that is less than two pixels thick in the square of ``side``: it would vanish there.
    """
    object_radius, usual_rim = inscribed_radius(mask), scale_length(radius, (crop.side,))
    if (thickness := 2 * object_radius * side / crop.side) < 2:
        raise UserError(
            f"the object is too small: {thickness:.1f} px thick at the backbone's {side} px; enlarge it, "
            "cut the photograph around a part of it, or use a larger backbone"
        )
    return math.ceil(min(usual_rim, max(object_radius, SMALLEST_RIM * usual_rim)))


def check_sizes(background: np.ndarray, **others: np.ndarray | None) -> None:
    """UserError unless ``others`` (pictures and masks by name, or None) have the size of the background."""
    height, width = background.shape[:2]
    for name, array in others.items():
        if array is not None and array.shape[:2] != (height, width):
            sizes = f"{array.shape[1]} x {array.shape[0]} but the background is {width} x {height}"
            raise UserError(f"{name} is {sizes}: give box=x0,y0,x1,y1 or resize it")
