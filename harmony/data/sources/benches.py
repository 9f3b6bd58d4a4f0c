"""Benches of composition as a ``Selection``: a background, a place in it, and the object of another picture.

    cocoee    GT_3500/ID_GT.png, Mask_bbox_3500/ID_mask.png, Ref_3500/ID_ref.png           Yang 2022
    tf_icon   .../CAPTION/{bgN, fgN, fgN_mask, mask_bg_fg}.*                               Lu S. 2023
    murecom   CATEGORY/bg/{N.jpg, N_bbox.png}, CATEGORY/fgK/{N.jpg, N.png}                 Chen J. 2024
    libcom    {background, foreground, foreground_mask}/NAME.*, bbox/NAME.txt; maybe {composite, composite_mask}/NAME.*

All is of the split test. The image of a row is the background, which is no truth. ``exemplar`` shows the object, and
``composite`` the object in its place, where it has a mask; what a bench lacks is composed and written into the work
folder.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from harmony.core.errors import UserError
from harmony.core.foreign import is_file_name, parse_box, read_text
from harmony.data.captions import NO_LABEL
from harmony.data.sources.files import image_files, locate
from harmony.data.sources.folder import SCHEMA, mask_box
from harmony.data.sources.open_images.batches import map_in_threads
from harmony.data.sources.selection import BAD_NAME, CORNERS, EXTRAS, KEPT, Rules, Selection, Source, reject_repeats
from harmony.data.stamps import make_stamp
from harmony.pixels.composites import copy_paste, place
from harmony.pixels.exemplars import cut_out
from harmony.pixels.images import open_image, read_image, write_image
from harmony.pixels.masks import bounding_box, read_mask

SPLIT = "test"


class Case(NamedTuple):
    """The files of one composite; each may be missing.

    ``place``: a picture, white where the object goes, or a text with its box. ``foreground_mask``: None where the bench
    has none, so that the place itself is painted over. ``composite``: (picture, mask), where the bench has its own.
    """

    id: str
    background: Path
    foreground: Path
    foreground_mask: Path | None
    place: Path
    composite: tuple[Path, Path] | None = None
    label: str = NO_LABEL
    caption: str | None = None


# --- layouts


def list_cocoee(root: Path) -> Iterator[Case]:
    """Yield the cases of COCOEE."""
    for background in pictures_in(root / "GT_3500"):
        id_ = background.stem.removesuffix("_GT")
        exemplars = [root / "Ref_3500" / f"{id_}{ending}.png" for ending in ("_ref", "_GT", "")]
        exemplar = next((path for path in exemplars if path.is_file()), exemplars[0])
        yield Case(id_, background, exemplar, None, root / "Mask_bbox_3500" / f"{id_}_mask.png")


def list_tf_icon(root: Path) -> Iterator[Case]:
    """Yield the cases of TF-ICON: each folder with a background or a foreground is one, called as its caption."""
    for folder in sorted(path for path in root.rglob("*") if path.is_dir()):
        files = {file.stem.lower(): file for file in image_files(folder)}
        backgrounds, foregrounds = ([n for n in files if n.startswith(kind)] for kind in ("bg", "fg"))
        masks, places = [n for n in foregrounds if n.endswith("mask")], [n for n in files if n.startswith("mask")]
        names = {
            "bg": backgrounds,
            "fg": [name for name in foregrounds if name not in masks],
            "fg_mask": masks,
            "mask_bg_fg": places,
        }
        parts = [files[matches[0]] if matches else folder / f"{name}.png" for name, matches in names.items()]
        if backgrounds or foregrounds:
            yield Case("_".join(folder.relative_to(root).parts), *parts, caption=folder.name)


def list_murecom(root: Path) -> Iterator[Case]:
    """Yield the cases of MureCom: each background with each object of its category, as its first picture shows it."""
    for category in sorted(path for path in root.iterdir() if (path / "bg").is_dir()):
        backgrounds = [path for path in pictures_in(category / "bg") if not path.stem.endswith("_bbox")]
        for background in backgrounds:
            for objects in sorted(path for path in category.glob("fg*") if path.is_dir()):
                names = sorted(path.stem for path in pictures_in(objects) if "_" not in path.stem)
                first = objects / (names[0] if names else "0")
                yield Case(
                    f"{category.name}_{background.stem}_{objects.name}",
                    background,
                    picture_at(first, (".jpg", ".jpeg")),
                    first.with_name(f"{first.name}.png"),
                    background.with_name(f"{background.stem}_bbox.png"),
                    label=category.name.replace("_", " ").lower(),
                )


def list_libcom(root: Path) -> Iterator[Case]:
    """Yield the cases of libcom's folders; where a foreground is a folder of pictures, the first of them."""
    for background in pictures_in(root / "background"):
        name = background.stem
        foreground = first_picture(root / "foreground" / name)
        mask = picture_at(
            root / "foreground_mask" / foreground.relative_to(root / "foreground").parent / foreground.stem
        )
        pictures = tuple(picture_at(root / folder / name) for folder in ("composite", "composite_mask"))
        composite = pictures if all(path.is_file() for path in pictures) else None
        yield Case(name, background, foreground, mask, root / "bbox" / f"{name}.txt", composite)


BENCHES: dict[str, Callable[[Path], Iterator[Case]]] = {
    "cocoee": list_cocoee,
    "tf_icon": list_tf_icon,
    "murecom": list_murecom,
    "libcom": list_libcom,
}


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, which may be missing."""
    return image_files(folder) if folder.is_dir() else []


def picture_at(path: Path, suffixes: Sequence[str] = (".png", ".jpg", ".jpeg", ".webp")) -> Path:
    """The picture ``path`` with whichever suffix it has; with the first if there is none."""
    paths = [path.with_name(path.name + suffix) for suffix in suffixes]
    return next((path for path in paths if path.is_file()), paths[0])


def first_picture(path: Path) -> Path:
    """The picture ``path`` with its suffix, or the first one in the folder ``path``."""
    return next(iter(pictures_in(path)), picture_at(path))


# --- selection


def find_bench(name: str) -> Source:
    """Find the source of a bench. UserError for another name."""
    if name not in BENCHES:
        raise UserError(f"dataset.bench={name}: no such bench; choose one of {', '.join(BENCHES)}")
    return Source(partial(select_recipe, name), partial(read_captions, name), list_places)


def select_recipe(bench: str, recipe: dict, work: Path) -> Selection:
    """Select the cases of a recipe; composites go to ``work``."""
    return select_cases(locate(recipe), bench, Rules.of(recipe["select"]), work)


def select_cases(root: Path, bench: str, rules: Rules, work: Path) -> Selection:
    """Select all cases of a bench whose files are usable; the others get a reason. UserError if there are none."""
    cases = list(BENCHES[bench](root))
    if not cases:
        raise UserError(f"{root}: nothing in the layout of {bench} there; see datasets/{bench}/README.md")
    rows = map_in_threads(lambda case: case_row(case, root, rules, work), cases, f"compose {bench}")
    reject_repeats(rows)
    return Selection(root, pl.DataFrame(rows, schema=SCHEMA | dict.fromkeys(EXTRAS, pl.String)).sort("id"), rules)


def case_row(case: Case, root: Path, rules: Rules, work: Path) -> dict:
    """The row of ``COLUMNS`` and ``EXTRAS`` of a case."""
    if not (is_file_name(case.id) and is_file_name(case.background.name)):
        name = case.id.encode(errors="replace").decode()
        return {"split": SPLIT, "id": name, "image": name, "reason": BAD_NAME}
    row = {"split": SPLIT, "id": case.id, "label": case.label, "image": os.path.relpath(case.background, root)}
    if not case.background.is_file():
        return row | {"reason": "image file missing"}
    parts = [case.foreground] if case.foreground_mask is None else [case.foreground, case.foreground_mask]
    if not all(path.is_file() for path in parts):
        return row | {"reason": "foreground file missing"}
    try:
        size = open_image(case.background).size
    except UserError:
        return row | {"reason": "image undecodable"}
    files = case_files(case, size, work)
    if isinstance(files, str):
        return row | {"reason": files}
    reason, box = mask_box(case.background, files["mask"], rules, size)
    if reason == KEPT and "composite" in files and open_image(files["composite"]).size != size:
        reason = "composite shape differs"
    row |= {name: os.path.relpath(path, root) for name, path in files.items()}
    return row | {"reason": reason, **dict(zip(CORNERS, box, strict=True))}


def case_files(case: Case, size: tuple[int, int], work: Path) -> dict[str, Path] | str:
    """The files of mask, exemplar and composite of a case, composed where it has none; or the reason against it."""
    try:
        foreground = read_image(case.foreground)
        if case.foreground_mask is None:
            return {"mask": case.place, "exemplar": case.foreground}
        mask = read_mask(case.foreground_mask, foreground.shape[1::-1], resize=True)
    except UserError:
        return "foreground undecodable"
    if case.composite is None and (box := read_place(case.place, size)) is None:
        return "no place for the object"
    stamp = make_stamp(map(str, (case.background, case.foreground, case.foreground_mask, case.place)))[:8]
    names = ("mask", "exemplar", "composite")
    files = {name: work / "composed" / name / f"{case.id}-{stamp}.png" for name in names}
    if not files["exemplar"].is_file():
        write_image(files["exemplar"], cut_out(foreground, mask))
    if case.composite is not None:
        try:
            open_image(case.composite[0])
        except UserError:
            return "composite undecodable"
        return files | {"composite": case.composite[0], "mask": case.composite[1]}
    try:
        if not (files["composite"].is_file() and files["mask"].is_file()):
            object_, object_mask = place(foreground, mask, box, *size)
            write_image(files["mask"], object_mask)
            write_image(files["composite"], copy_paste(read_image(case.background), object_, object_mask))
    except UserError:
        return "no place for the object"
    return files


def read_place(path: Path, size: tuple[int, int]) -> tuple[float, ...] | None:
    """The box x0, y0, x1, y1 in pixels of a picture of ``size``: that of a mask of any size, or of a text; or None."""
    try:
        if path.suffix == ".txt":
            box = parse_box(read_text(path))
            return None if box is None else tuple(box)
        mask = read_mask(path)
    except UserError:
        return None
    scale = np.tile(np.array(size) / mask.shape[::-1], 2)
    return tuple((scale * bounding_box(mask)).tolist())


def read_captions(bench: str, root: Path, splits: Sequence[str]) -> dict[str, list[str]]:
    """Read the captions of a bench, {<split>/<id>: [caption]}, which only TF-ICON has: its folders' names."""
    return {f"{SPLIT}/{case.id}": [case.caption] for case in BENCHES[bench](root) if case.caption}


def list_places(root: Path, splits: Sequence[str]) -> list[Path]:
    """List the folder of the bench."""
    return [root]
