"""What a person brings: photographs, cut-outs, masks and boxes, alone or as a folder of composites."""

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from harmony.core.errors import UserError
from harmony.data.descriptions import Description, parse_descriptions, read_descriptions
from harmony.methods.insert import Insertion, Result, check_sizes, cut, working_square
from harmony.methods.method import EXEMPLAR, LIGHTS, Method
from harmony.pixels.composites import copy_paste, place, poisson, reinhard
from harmony.pixels.exemplars import cut_out
from harmony.pixels.images import crop_resize, grid, open_image, read_image, resize
from harmony.pixels.masks import OBJECT, read_mask

PICTURES = ("background", "foreground", "composite", "mask", "box", "region", "reference")  # options that name pixels
SHEET_SIDE = 384  # pixels: the longer side of a picture on the contact sheet


@dataclass(frozen=True)
class Inputs:
    """``background``, ``foreground`` uint8 H x W x 3, ``mask`` and (or None) ``region`` bool H x W, all of one size.

    ``reference`` uint8 of any size: the exemplar, where it is a picture of its own. ``lights``: what the user says of
    the object's light and of that around it. ``name``: what results are called after.
    """

    background: np.ndarray
    foreground: np.ndarray
    mask: np.ndarray
    region: np.ndarray | None = None
    reference: np.ndarray | None = None
    lights: tuple[Description, ...] = ()
    name: str = ""

    def cut(self, method: Method, caption: str = "") -> Insertion:
        """The square that ``method`` works on. UserError for what it cannot use, and for words that it lacks."""
        if LIGHTS in method.wants and not self.lights:
            raise UserError("describer=given wants the words for both lights: give prompts=")
        if self.reference is not None and EXEMPLAR not in method.wants:
            raise UserError(
                "reference= goes with method=paint_by_example; other methods want foreground= or composite="
            )
        if self.region is not None and not method.radius and EXEMPLAR not in method.wants:
            raise UserError("region= goes with methods that paint anew; method=zero_shot changes the object alone")
        radius = method.radius if self.reference is None else 0  # a mask that was painted by hand is the hole itself
        shown = None
        if EXEMPLAR in method.wants:
            shown = cut_out(self.foreground, self.mask) if self.reference is None else self.reference
        words = {"caption": caption, "exemplar": shown, "lights": self.lights, "name": self.name}
        pictures = (self.background, self.foreground, self.mask, self.region)
        return cut(method.resolution, *pictures, radius, **words)


def size(image: np.ndarray) -> tuple[int, int]:
    return image.shape[1], image.shape[0]


def alpha_mask(path: str) -> np.ndarray:
    """Bool H x W: where a cut-out is opaque. UserError for a picture without transparency."""
    opaque = np.asarray(open_image(path).convert("RGBA"))[..., 3] > OBJECT
    if opaque.all():
        raise UserError(f"{path} has no transparent background and no mask was given; add mask=PATH")
    if not opaque.any():
        raise UserError(f"{path} is transparent everywhere; give the cut-out with its object opaque")
    return opaque


def on_white(path: str) -> np.ndarray:
    """A picture, uint8 H x W x 3, on white where it is transparent."""
    pixels, opaque = read_image(path), np.asarray(open_image(path).convert("RGBA"))[..., 3:] / 255
    return np.rint(opaque * pixels + (1 - opaque) * 255).astype(np.uint8)


def read_box(box: Any) -> tuple[float, ...] | None:
    if box is None:
        return None
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) for v in box):
        raise UserError(f"box={box}: give four numbers, box=x0,y0,x1,y1, in pixels of the background")
    return tuple(box)


def read_inputs(options: Mapping[str, Any]) -> Inputs:
    """Read, place and check what ``options`` (``PICTURES`` and ``prompts``) name. UserError for what does not fit."""
    o = {name: None for name in (*PICTURES, "prompts")} | dict(options)
    name = Path(o["composite"] or o["foreground"] or o["background"] or "").stem
    if o["reference"] is not None:
        return replace(read_reference(o), name=name)
    composite, background = o["composite"], o["background"]
    if (composite is None) == (background is None) or (background is None) != (o["foreground"] is None):
        raise UserError("give background=PATH and foreground=PATH, or composite=PATH alone, which has the object in it")
    box = read_box(o["box"])
    if composite is not None and box is not None:
        raise UserError("box= places a foreground of its own; with composite= the object stays where it is")
    image = read_image(composite or background)
    foreground = image if composite else read_image(o["foreground"])
    mask = read_mask(o["mask"], size(foreground)) if o["mask"] else alpha_mask(composite or o["foreground"])
    if box is not None:
        foreground, mask = place(foreground, mask, box, *size(image))
    region = read_mask(o["region"], size(image)) if o["region"] else None
    check_sizes(image, foreground=foreground, mask=mask, region=region)
    return Inputs(image, foreground, mask, region, lights=read_lights(o["prompts"], name), name=name)


def read_reference(o: Mapping[str, Any]) -> Inputs:
    """Background, where to paint, and what: the object of the exemplar is not cut out."""
    others = any(o[name] is not None for name in ("foreground", "composite", "box"))
    if o["background"] is None or o["mask"] is None or others:
        raise UserError("reference= wants background=PATH and mask=PATH, white where to paint, and nothing else")
    background, reference = read_image(o["background"]), on_white(o["reference"])
    mask = read_mask(o["mask"], size(background))
    region = read_mask(o["region"], size(background)) if o["region"] else None
    return Inputs(background, background, mask, region, reference)


def read_lights(prompts: Any, name: str) -> tuple[Description, ...]:
    """The descriptions of the command line, or those for ``name`` in its JSON file; none where none are given."""
    if prompts is None:
        return ()
    text = str(prompts)
    return tuple(read_descriptions(Path(text), name) if text.endswith(".json") else parse_descriptions(text))


# --- folders


def list_composites(folder: Path) -> list[tuple[str, dict]]:
    """(id, options) of each composite of a folder: the rows of ``index.csv``, or else ``composite/`` with ``mask/``.

    A row names ``composite`` and ``mask``, or ``background``, ``foreground``, ``foreground_mask`` and ``bbox`` (x0 y0
    x1 y1 in pixels of the background), paths relative to the folder.
    """
    if not folder.is_dir():
        raise UserError(f"dir={folder}: there is no such folder")
    if not (folder / "index.csv").exists():
        pairs = [(p, q) for p in sorted(folder.glob("composite/*")) for q in folder.glob(f"mask/{p.stem}.*")]
        if not pairs:
            raise UserError(f"{folder} has neither index.csv nor composite/NAME with mask/NAME: nothing to harmonize")
        return distinct(folder, [(p.stem, {"composite": str(p), "mask": str(q)}) for p, q in pairs])
    items, short = [], []
    with open(folder / "index.csv", newline="", encoding="utf-8") as file:
        for i, row in enumerate(csv.DictReader(file)):
            name = row.get("id") or str(i)
            at = {key: str(folder / value) for key, value in row.items() if key and value}
            if row.get("composite") and row.get("mask"):
                items.append((name, {"composite": at["composite"], "mask": at["mask"]}))
            elif all(row.get(key) for key in ("background", "foreground", "foreground_mask", "bbox")):
                box = [float(v) for v in row["bbox"].replace(",", " ").split()]
                places = {"background": at["background"], "foreground": at["foreground"], "mask": at["foreground_mask"]}
                items.append((name, places | {"box": box}))
            else:
                short.append(name)
    if short:
        print(f"{len(short)} rows name neither a composite with its mask nor a foreground with mask and box: {short}")
    return distinct(folder, items)


def distinct(folder: Path, items: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """``items`` themselves. UserError unless each id is a name of a folder that no other has."""
    names = Counter(name for name, _ in items)
    for name, count in names.items():
        if count > 1 or name in ("", "..") or Path(name).name != name:
            raise UserError(f"{folder}: '{name}' must be a file name that no other composite has")
    return items


# --- contact sheets


def sheet(inputs: Inputs, result: Result, image: np.ndarray) -> np.ndarray:
    """Contact sheet: the whole pictures above, the square that the method worked on below.

    Where an exemplar was painted there is no composite: the exemplar stands in its place.
    """
    background, reference = inputs.background, inputs.reference
    scale = min(1, SHEET_SIDE / max(background.shape[:2]))
    width, height = (max(1, round(scale * length)) for length in size(background))
    shown = [background, result.composite, image]
    whole = [resize(picture, width, height) for picture in shown]
    close = [crop_resize(picture, result.crop, min(width, height)) for picture in shown]
    if reference is not None:
        whole[1] = close[1] = resize(reference, *(min(width, height),) * 2)
    return grid([whole, close], ["background", "composite" if reference is None else "exemplar", "harmonized"])


def beside_baselines(inputs: Inputs, image: np.ndarray) -> list[np.ndarray]:
    """Small pictures of the working square: composite, harmonized, and the composites without a network.

    Poisson blending wants the object's old surroundings or its new ones: a composite has neither, its place stays grey.
    """
    background, foreground, mask = inputs.background, inputs.foreground, inputs.mask
    recolored = copy_paste(background, reinhard(foreground, mask, background), mask)
    whole = foreground is background
    blended = np.full_like(background, 128) if whole else poisson(background, foreground, mask)
    pictures = [copy_paste(background, foreground, mask), image, recolored, blended]
    crop = working_square(mask, inputs.region)
    return [crop_resize(picture, crop, SHEET_SIDE // 2) for picture in pictures]
