"""Reads the user's photographs, cut-outs, masks and boxes, of one composite or of a folder of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from harmony.core.errors import UserError
from harmony.core.foreign import is_file_name, parse_box, read_table
from harmony.data.descriptions import Description, parse_descriptions, read_descriptions
from harmony.methods.insert import Insertion, Result, check_sizes, cut, find_shadow_region, find_square
from harmony.methods.method import EXEMPLAR, LIGHTS, Method
from harmony.pixels.color_profiles import Photograph, read_in_space, read_photograph, to_srgb
from harmony.pixels.composites import copy_paste, place, poisson, reinhard
from harmony.pixels.exemplars import cut_out
from harmony.pixels.images import crop_resize, grid, limit_size, open_image, resize
from harmony.pixels.masks import OBJECT, read_mask

PICTURES = ("background", "foreground", "composite", "mask", "box", "region", "reference")  # options that give pixels
OWN_NAMES = ("sheet.png", "report.html", "metrics.json", "config.yaml")  # our files beside the folders of composites
SHEET_SIDE = 384  # pixels of the longer side of a picture on the contact sheet


@dataclass(frozen=True)
class Inputs:
    """The pictures and words of one composite.

    ``background``, ``foreground`` uint8 H x W x 3 and ``mask``, ``region`` bool H x W have one size; ``region`` may be
    None. ``plate``: the photograph without the object, for Poisson's baseline, where a composite's is known.
    ``reference``: the exemplar, uint8 of any size, where it is a separate picture. ``lights``: descriptions of
    the object's light and of the light around it. ``name``: the name of the results. ``profile``: the photograph's
    color profile, which all colors are in. ``notes``: lines on what happened to colors. ``exif``: the photograph's.
    """

    background: np.ndarray
    foreground: np.ndarray
    mask: np.ndarray
    region: np.ndarray | None = None
    reference: np.ndarray | None = None
    plate: np.ndarray | None = None
    lights: tuple[Description, ...] = ()
    name: str = ""
    profile: bytes | None = None
    notes: tuple[str, ...] = ()
    exif: bytes | None = None

    @property
    def is_placed(self) -> bool:
        """Whether the object comes from a picture of its own, and the background shows nothing of it."""
        return self.foreground is not self.background

    def cut(self, method: Method, caption: str = "", shadow: bool = False) -> Insertion:
        """The square that ``method`` fills. UserError for inputs that it cannot use or that it lacks.

        ``shadow``: an object that is placed may also darken what is around its lower part, if no region is given and
        the method relights.
        """
        if LIGHTS in method.wants and not self.lights:
            raise UserError("describer=given needs the words for both lights: give prompts=")
        if self.reference is not None and EXEMPLAR not in method.wants:
            raise UserError(
                "reference= goes with method=paint_by_example; other methods take foreground= or composite="
            )
        if self.region is not None and not method.radius and EXEMPLAR not in method.wants:
            raise UserError("region= goes with methods that paint anew; method=zero_shot changes the object alone")
        radius = method.radius if self.reference is None else 0  # a hand-painted mask is the hole itself
        exemplar = None
        if EXEMPLAR in method.wants:
            exemplar = cut_out(self.foreground, self.mask) if self.reference is None else self.reference
            exemplar = to_srgb(exemplar, self.profile)
        region = self.region
        if region is None and shadow and self.is_placed and method.relights and radius:
            region = find_shadow_region(self.mask)
        fields = {"caption": caption, "exemplar": exemplar, "lights": self.lights, "name": self.name}
        pictures = (self.background, self.foreground, self.mask, region)
        return cut(method.resolution, *pictures, radius, self.profile, **fields)


def get_size(image: np.ndarray) -> tuple[int, int]:
    """Width and height."""
    return image.shape[1], image.shape[0]


def read_alpha_mask(path: str) -> np.ndarray:
    """The mask of a cut-out, bool H x W: where it is opaque. UserError for a picture without transparency."""
    opacity = np.asarray(open_image(path).convert("RGBA"))[..., 3] > OBJECT
    if opacity.all():
        raise UserError(f"{path} has no transparent background and no mask was given; add mask=PATH")
    if not opacity.any():
        raise UserError(f"{path} is transparent everywhere; give the cut-out with its object opaque")
    return opacity


def put_on_white(pixels: np.ndarray, path: str) -> np.ndarray:
    """The pixels of the picture ``path``, uint8 H x W x 3, made white where it is transparent."""
    opacity = np.asarray(open_image(path).convert("RGBA"))[..., 3:] / 255
    return np.rint(opacity * pixels + (1 - opacity) * 255).astype(np.uint8)


def read_box(box: Any) -> tuple[float, ...] | None:
    """Check the option ``box``: None, or x0, y0, x1, y1 in pixels of the background."""
    if box is None:
        return None
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) for v in box):
        raise UserError(f"box={box}: give four numbers, box=x0,y0,x1,y1, in pixels of the background")
    return tuple(box)


def choose_box(width: int, height: int) -> tuple[int, ...]:
    """A box for a cut-out that nobody has placed: half as wide and high as the background, at the bottom center."""
    return round(width / 4), round(height * 0.45), round(width * 3 / 4), round(height * 0.95)


def read_inputs(options: Mapping[str, Any]) -> Inputs:
    """Read, place and check the pictures and prompts in ``options``. UserError for what does not fit."""
    o = {name: None for name in (*PICTURES, "prompts", "plate")} | dict(options)
    name = Path(o["composite"] or o["foreground"] or o["background"] or "").stem
    if o["reference"] is not None:
        return replace(read_reference(o), name=name)
    composite, background = o["composite"], o["background"]
    if (composite is None) == (background is None) or (background is None) != (o["foreground"] is None):
        raise UserError("give background=PATH and foreground=PATH, or composite=PATH alone, which has the object in it")
    box = read_box(o["box"])
    if composite is not None and box is not None:
        raise UserError(
            "box= goes with foreground=; with composite= the object is in its place already: leave out box="
        )
    photograph = read_photograph(composite or background)
    object_picture = photograph if composite else read_in_space(o["foreground"], photograph.profile)
    image, foreground = photograph.pixels, object_picture.pixels
    mask = read_mask(o["mask"], get_size(foreground)) if o["mask"] else read_alpha_mask(composite or o["foreground"])
    notes = photograph.notes if composite else photograph.notes + object_picture.notes
    if box is None and get_size(foreground) != get_size(image):
        box = choose_box(*get_size(image))
        notes += (f"the cut-out, smaller or larger than the background, goes to box={','.join(map(str, box))}",)
    if box is not None:
        foreground, mask = place(foreground, mask, box, *get_size(image))
    region = read_mask(o["region"], get_size(image)) if o["region"] else None
    check_sizes(image, foreground=foreground, mask=mask, region=region)
    lights = read_lights(o["prompts"], name)
    plate = read_plate(o["plate"], photograph)
    colors = {"profile": photograph.profile, "notes": notes, "exif": photograph.exif}
    return Inputs(image, foreground, mask, region, None, plate, lights, name, **colors)


def read_plate(path: str | None, photograph: Photograph) -> np.ndarray | None:
    """The photograph without the object; None where it is unknown, unreadable or of another size."""
    try:
        plate = path and read_in_space(path, photograph.profile).pixels
    except UserError:
        return None
    return plate if plate is not None and plate.shape == photograph.pixels.shape else None


def read_reference(o: Mapping[str, Any]) -> Inputs:
    """Read a background, the mask of where to paint, and an exemplar whose object is not cut out."""
    has_others = any(o[name] is not None for name in ("foreground", "composite", "box"))
    if o["background"] is None or o["mask"] is None or has_others:
        raise UserError("reference= needs background=PATH and mask=PATH, white where to paint, and nothing else")
    photograph = read_photograph(o["background"])
    exemplar = read_in_space(o["reference"], photograph.profile)
    background, reference = photograph.pixels, put_on_white(exemplar.pixels, o["reference"])
    mask = read_mask(o["mask"], get_size(background))
    region = read_mask(o["region"], get_size(background)) if o["region"] else None
    notes = photograph.notes + exemplar.notes
    colors = {"profile": photograph.profile, "notes": notes, "exif": photograph.exif}
    return Inputs(background, background, mask, region, reference, **colors)


def read_lights(prompts: Any, name: str) -> tuple[Description, ...]:
    """Descriptions as typed on the command line, or those of ``name`` in a JSON file; none where none are given."""
    if prompts is None:
        return ()
    text = str(prompts)
    return tuple(read_descriptions(Path(text), name) if text.endswith(".json") else parse_descriptions(text))


# --- folders


def list_composites(folder: Path) -> tuple[list[tuple[str, dict]], list[str]]:
    """(id, options) of each composite of a folder, from ``index.csv`` or from ``composite/`` and ``mask/``.

    Second, what is left out because something of it is missing; a line names it.
    A row of ``index.csv`` has ``composite`` and ``mask``, or ``background``, ``foreground``, ``foreground_mask`` and
    ``bbox`` (x0 y0 x1 y1 in pixels of the background); paths are relative to the folder. The ``background`` of a
    finished composite serves the Poisson baseline of the contact sheet.
    """
    if not folder.is_dir():
        raise UserError(f"dir={folder}: there is no such folder; give one that exists")
    if not (folder / "index.csv").exists():
        return pair_files(folder)
    items, incomplete_ids, bad_ids = {}, [], []
    for i, row in enumerate(read_table(folder / "index.csv")):
        name = row.get("id") or str(i)
        options = read_row(folder, row)
        if options is None:
            incomplete_ids.append(name)
        elif name in items or name in OWN_NAMES or not is_file_name(name):
            bad_ids.append(name)
        else:
            items[name] = options
    if incomplete_ids:
        parts = "neither a composite with its mask nor a foreground with mask and box"
        print(f"{len(incomplete_ids)} left out, the row of index.csv names {parts}: {incomplete_ids}")
    if bad_ids:
        print(f"{len(bad_ids)} left out, the id is no file name, of an earlier row, or of a file of ours: {bad_ids}")
    if not items:
        raise UserError(f"{folder / 'index.csv'} has no row that can be harmonized: give each an id, pictures and mask")
    return list(items.items()), incomplete_ids + bad_ids


def pair_files(folder: Path) -> tuple[list[tuple[str, dict]], list[str]]:
    """(id, options) of each picture in ``composite/`` with the mask of its name, and the pictures without one."""
    masks, items, lonely_names = group_files(folder / "mask"), [], []
    for name, files in group_files(folder / "composite").items():
        if len(files) == len(masks.get(name, ())) == 1 and name not in OWN_NAMES:
            items.append((name, {"composite": str(files[0]), "mask": str(masks[name][0])}))
        else:
            lonely_names += [file.name for file in files]
    if not items:
        raise UserError(f"{folder} has neither index.csv nor composite/NAME with mask/NAME: nothing to harmonize")
    if lonely_names:
        print(f"{len(lonely_names)} left out, not exactly one composite and one mask of the name: {lonely_names}")
    return items, lonely_names


def group_files(folder: Path) -> dict[str, list[Path]]:
    """Name without suffix -> the files of a folder, hidden ones apart; names are compared letter by letter."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.name.startswith("."):
            groups.setdefault(path.stem, []).append(path)
    return groups


def read_row(folder: Path, row: Mapping[str, str]) -> dict | None:
    """The options of a row of ``index.csv``; None for an incomplete one and for a box that is none."""
    paths = {key: str(folder / value) for key, value in row.items() if value}
    if {"composite", "mask"} <= set(paths):
        return {"composite": paths["composite"], "mask": paths["mask"], "plate": paths.get("background")}
    box = parse_box(row.get("bbox", ""))
    if box is None or not {"background", "foreground", "foreground_mask"} <= set(paths):
        return None
    background, foreground, mask = (paths[key] for key in ("background", "foreground", "foreground_mask"))
    return {"background": background, "foreground": foreground, "mask": mask, "box": box}


# --- contact sheets


def draw_sheet(inputs: Inputs, result: Result, image: np.ndarray) -> np.ndarray:
    """A contact sheet: the whole pictures above, the square that the method filled below.

    The exemplar, where there is one, takes the place of the composite.
    """
    background, reference = inputs.background, inputs.reference
    width, height = limit_size(*get_size(background), SHEET_SIDE)
    pictures, side = [background, result.composite, image], min(width, height)
    overviews = [resize(picture, width, height) for picture in pictures]
    closeups = [crop_resize(picture, result.crop, side) for picture in pictures]
    if reference is not None:
        overviews[1] = closeups[1] = resize(reference, side, side)
    return grid([overviews, closeups], ["background", "composite" if reference is None else "exemplar", "harmonized"])


def compare_baselines(inputs: Inputs, image: np.ndarray) -> list[np.ndarray]:
    """Small pictures of the square: composite, harmonized, and Reinhard's and Poisson's baselines.

    Poisson blending needs what was behind the object, which a composite has lost: without a plate its picture is gray.
    """
    background, foreground, mask = inputs.background, inputs.foreground, inputs.mask
    crop, side = find_square(mask, inputs.region), SHEET_SIDE // 2
    reinhard_picture = copy_paste(background, reinhard(foreground, mask, background), mask)
    pictures = [copy_paste(background, foreground, mask), image, reinhard_picture]
    squares = [crop_resize(picture, crop, side) for picture in pictures]
    if not inputs.is_placed:
        if inputs.plate is None:
            return [*squares, np.full_like(squares[0], 128)]
        background = inputs.plate
    parts = (crop_resize(array, crop, side) for array in (background, foreground, mask))
    return [*squares, poisson(*parts, surroundings=False)]
