"""Eval sets: composites with their truths, on which every method sees the same pictures, holes and noise.

Reconstruction: the instance's own photograph is the truth; hole and hints come from the same photograph. Relighting
(studio): the object lit by light B goes onto the empty plate lit by light A, and the render of the object under light
A, with its shadow, is the truth. Of pairs the composite is given and the photograph is the truth. Sampling starts from
pure noise; figures are given for the raw output and after paste-back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from harmony.core.errors import UserError
from harmony.core.row import Row
from harmony.data.captions import HUMAN_CAPTION
from harmony.data.descriptions import Description
from harmony.data.latent_cache import Example, Recipe, example
from harmony.data.manifest import read_manifest
from harmony.methods.method import Composite, fingerprint
from harmony.pixels.composites import paste_back
from harmony.pixels.exemplars import cut_out
from harmony.pixels.images import crop_resize, grid, read_image, resize
from harmony.pixels.masks import TEST_RADIUS, bounding_box, hole, read_mask

RECONSTRUCT, RELIGHT, EXEMPLAR = "reconstruct", "relight", "exemplar"
SHOWN_TO = Recipe(hints={"exemplar": {}})  # the test protocol, with what Paint by Example is shown
Item = TypeVar("Item")


@dataclass(frozen=True)
class EvalSet:
    """Composites of one split, ``name``, and their ``truths``, uint8 R x R x 3.

    ``kind``: reconstruct (the truth's own instance), relight (an instance under another light) or exemplar (there is no
    truth: ``truths`` are the pictures that are painted into). ``shadows`` bool R x R: where the truth's cast shadow
    lies.
    """

    name: str
    composites: list[Composite]
    truths: list[np.ndarray]
    shadows: list[np.ndarray] | None = None
    kind: str = RECONSTRUCT

    def __len__(self) -> int:
        return len(self.composites)

    def part(self, indices: Sequence[int]) -> "EvalSet":
        """The items at ``indices``."""
        parts = [[items[i] for i in indices] for items in (self.composites, self.truths)]
        shadows = None if self.shadows is None else [self.shadows[i] for i in indices]
        return EvalSet(self.name, *parts, shadows, self.kind)

    @property
    def backgrounds(self) -> list[np.ndarray]:
        return [c.background for c in self.composites]

    @property
    def instances(self) -> list[np.ndarray]:
        return [c.instance for c in self.composites]

    @property
    def captions(self) -> list[str]:
        return [c.caption for c in self.composites]

    @property
    def names(self) -> list[str]:
        return [c.name for c in self.composites]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that outputs on this set depend on beside the method."""
        return fingerprint([c.fingerprint for c in self.composites])


def subsample(items: list[Item], limit: int | None) -> list[Item]:
    """Up to ``limit`` items, evenly over the list."""
    if limit is None or limit >= len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def composite_of(e: Example, row: Row, **changes) -> Composite:
    """The composite of an example whose instance stands in its own picture; ``changes``: other fields."""
    square = Composite(
        e.image, e.image, e.mask, e.hole, row.caption, e.exemplar,
        name=row.id, crop=e.crop, size=(row.width, row.height), is_photograph="relit" not in row.extras,
    )  # fmt: skip
    return replace(square, **changes)


def read_truths(manifest: Path, split: str) -> list[Row]:
    """The rows of a split whose image is a truth. UserError for a bench of composition, where none is."""
    rows = read_manifest(manifest, split)[1]
    if rows and not any(row.has_truth for row in rows):
        raise UserError(
            f"{manifest} knows no truths, its objects come from other pictures: use experiment=exemplar_bench, or "
            f"harmonize dir={Path(manifest).parent}"
        )
    return [row for row in rows if row.has_truth]


def load_reconstruct(manifest: Path, split: str, resolution: int, limit: int | None = None) -> EvalSet:
    """Reconstruction by the test protocol (center crop, dilated hole) of up to ``limit`` rows of the split.

    UserError for a dataset that has no truths.
    """
    rows = subsample(read_truths(manifest, split), limit)
    root = Path(manifest).parent
    examples = [example(row, root, SHOWN_TO, resolution) for row in rows]
    composites = [composite_of(e, row) for e, row in zip(examples, rows, strict=True)]
    return EvalSet(split, composites, [e.image for e in examples])


def load_relight(
    manifest: Path, split: str, resolution: int, limit: int | None = None, radius: float = TEST_RADIUS
) -> EvalSet:
    """Relighting of up to ``limit`` renders or pairs; the hole is the instance dilated by ``radius``, px at 512.

    UserError for a dataset that has neither plates, objects under a second light, and shadows, nor composites.
    """
    root = Path(manifest).parent
    rows = [row for row in read_truths(manifest, split) if is_render_pair(row) or "composite" in row.extras]
    if not (rows := subsample(rows, limit)):
        raise UserError(
            f"{manifest} knows no truth for relighting (plate, relit and shadow, or composite): use dataset=studio or "
            "dataset=pairs"
        )
    says_all = all(map(says_lights, rows))
    composites, truths, shadows = [], [], []
    for row in rows:
        e = example(row, root, Recipe(), resolution)
        background, foreground = (read_image(root / row.extras[name]) for name in relight_pictures(row))
        mask = read_mask(root / row.mask, (row.width, row.height), resize=True)
        changes = {
            "background": crop_resize(background, e.crop, resolution),
            "instance": crop_resize(foreground, e.crop, resolution),
            "hole": hole(e.mask, "dilate", radius=radius),
            "exemplar": cut_out(foreground, mask),
            "lights": (between(row.caption, row.extras["relit_caption"]),) if says_all else (),
        }
        composites.append(composite_of(e, row, **changes))
        truths.append(e.image)
        if is_render_pair(row):
            shadow = read_mask(root / row.extras["shadow"], (row.width, row.height), empty=True)
            shadows.append(crop_resize(shadow, e.crop, resolution))
    return EvalSet(split, composites, truths, shadows if len(shadows) == len(rows) else None, RELIGHT)


def is_render_pair(row: Row) -> bool:
    """Whether a row is a render with all that relighting is measured by."""
    return {"plate", "relit", "shadow"} <= set(row.extras)


def relight_pictures(row: Row) -> tuple[str, str]:
    """The names, in a row's extras, of the picture that receives the object and of that which shows it."""
    return ("plate", "relit") if is_render_pair(row) else ("composite", "composite")


def says_lights(row: Row) -> bool:
    """Whether the row's captions name the object's light in both pictures; a captioner's words need not."""
    return "relit_caption" in row.extras and row.extras.get("caption_source", HUMAN_CAPTION) == HUMAN_CAPTION


def between(caption: str, relit: str) -> Description:
    """The words of two captions of one object (``a red car on snow, grey overcast light``): ``caption`` says the light
    of the picture, ``relit`` that of the object that is put into it.
    """
    (object_, _, background), (_, _, foreground) = (text.rpartition(", ") for text in (caption, relit))
    return Description(f"{object_},", foreground, background)


def load_truths(kind: str, manifest: Path, split: str, resolution: int, limit: int | None, radius: float) -> EvalSet:
    """The eval set of a ``kind`` that has truths, reconstruct or relight."""
    if kind == RELIGHT:
        return load_relight(manifest, split, resolution, limit, radius)
    return load_reconstruct(manifest, split, resolution, limit)


def degrade(items: EvalSet, factor: int) -> EvalSet:
    """The same set with instances from pictures that were shrunk by ``factor`` and enlarged (Liu 2025, Fig. 7)."""
    if factor == 1:
        return items

    def poor(picture: np.ndarray, width: int, height: int) -> np.ndarray:
        """The picture shrunk to ``width`` x ``height`` by the factor, and enlarged again."""
        small = resize(picture, max(1, width // factor), max(1, height // factor))
        return resize(small, picture.shape[1], picture.shape[0])

    composites = []
    for c in items.composites:
        x0, y0, x1, y1 = bounding_box(c.mask)  # an exemplar loses what the instance loses at the set's resolution
        poorer = None if c.exemplar is None else poor(c.exemplar, x1 - x0, y1 - y0)
        instance = poor(c.instance, c.instance.shape[1], c.instance.shape[0])
        composites.append(replace(c, instance=instance, exemplar=poorer))
    return replace(items, composites=composites)


def with_holes(items: EvalSet) -> list[np.ndarray]:
    """The backgrounds, black in the hole: what of them a method sees."""
    return [np.where(c.hole[..., None], np.uint8(0), c.background) for c in items.composites]


def paste_outputs(items: EvalSet, raw: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs with everything outside the holes as it was."""
    return [paste_back(y, c.background, c.hole) for y, c in zip(raw, items.composites, strict=True)]


def sample_grid(items: EvalSet, columns: dict[str, list[np.ndarray]]) -> np.ndarray:
    """Picture, uint8 H x W x 3: a row an item, with the hole, ``columns`` (title -> a picture an item), the truth."""
    rows = [list(row) for row in zip(with_holes(items), *columns.values(), items.truths, strict=True)]
    return grid(rows, ["input", *columns, "truth"])


def enough(items: EvalSet) -> EvalSet:
    """``items`` themselves. UserError for fewer pictures than a distance between two sets needs."""
    if len(items) < 2:
        raise UserError(f"{len(items)} {items.name} picture: fid needs two at least, raise limit= or take more data")
    return items
