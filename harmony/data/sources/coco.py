"""Instances in COCO's JSON as a ``Selection``: each annotation with a mask is a row.

    annotations/instances_<NAME>.json    <NAME>/..., images/<NAME>/... or images/...     COCO, CVAT
    <split>/_annotations.coco.json       <split>/...                                     Roboflow
    labels.json                          data/... or images/...                          FiftyOne

A ``<NAME>`` that begins as a split (``train2017``) sets it; of others a hash of the photograph's name draws it. Masks
are polygons or run lengths, plain or compressed; they are written into the work folder.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from PIL import Image
from skimage.draw import polygon

from harmony.core.errors import UserError
from harmony.core.foreign import is_file_name, path_inside, read_json
from harmony.core.progress import tell
from harmony.core.row import SPLITS
from harmony.data.captions import NO_LABEL
from harmony.data.sources.files import SPLIT_NAMES, locate, split_folder
from harmony.data.sources.folder import SCHEMA, draw, draw_split
from harmony.data.sources.open_images.batches import BATCH, map_in_threads
from harmony.data.sources.selection import BAD_NAME, CORNERS, KEPT, SAME_NAME, Rules, Selection, Source, limit_samples
from harmony.pixels.images import write_image

DAMAGED = "damaged row"


class Annotations(NamedTuple):
    """A file of annotations, the folders in which its photographs may lie, and its split; None: the hash decides."""

    file: Path
    folders: tuple[Path, ...]
    split: str | None


class Instance(NamedTuple):
    """An annotation of a photograph, both as they stand in the file; ``photograph``: its file, None for a bad name."""

    id: str
    split: str
    image: dict
    annotation: dict
    photograph: Path | None


def select_recipe(recipe: dict, work: Path) -> Selection:
    """Select the instances of a recipe; their masks go to ``work``."""
    return select_instances(locate(recipe), recipe["splits"], Rules.of(recipe["select"]), work)


def select_instances(root: Path, splits: Sequence[str], rules: Rules, work: Path) -> Selection:
    """Select all instances that the rules allow; others, and photographs without one, get a reason.

    Raises UserError if there is no file of annotations, if one is no COCO JSON, and for an unknown class.
    """
    items: list[tuple[dict, Instance]] = []
    firsts: dict[tuple[str, str], Instance] = {}
    files = find_annotations(root)
    has_test = any(a.split in (None, "test") for a in files)
    for annotations in files:
        content = read_annotations(annotations.file)
        names = {c["id"]: str(c["name"]) for c in content["categories"] if is_entry(c, "id", "name")}
        check_classes(annotations.file, names, rules)
        for instance in list_instances(annotations, content, has_test):
            if instance.split not in splits:
                continue
            has_name = instance.photograph is not None
            if has_name and firsts.setdefault((instance.split, instance.id), instance) is not instance:
                items.append((duplicate_row(instance, root), instance))
            else:
                items.append((instance_row(instance, names, root, rules), instance))
    draw_masks([item for item in items if item[0]["reason"] == KEPT], root, work, rules.max_samples)
    table = pl.DataFrame([row for row, _ in items], schema=SCHEMA).sort("split", "id")
    return Selection(root, limit_samples(table, rules.max_samples), rules)


def draw_masks(items: Sequence[tuple[dict, Instance]], root: Path, work: Path, limit: int | None) -> None:
    """Draw the masks of rows: in each split in the order of ids, until ``limit`` are drawn (None: all)."""
    limit = len(items) if limit is None else limit
    for split in SPLITS:
        rest = sorted((item for item in items if item[0]["split"] == split), key=lambda item: item[0]["id"])
        count = 0
        while rest and count < limit:
            size = max(limit - count, BATCH)
            batch, rest = rest[:size], rest[size:]
            map_in_threads(lambda item: write_mask(*item, root, work), batch, f"draw the masks of {split}")
            count += sum(row["reason"] == KEPT for row, _ in batch)


# --- files


def find_annotations(root: Path) -> list[Annotations]:
    """Find the files of annotations. UserError if there are none."""
    candidates = []
    for file in sorted(root.glob("annotations/instances_*.json")):
        name = file.stem.removeprefix("instances_")
        candidates.append(Annotations(file, (root / name, root / "images" / name, root / "images"), split_of(name)))
    folders = {split: split_folder(root, split) for split in SPLITS}
    candidates += [
        Annotations(folder / "_annotations.coco.json", (folder,), split) for split, folder in folders.items()
    ]
    candidates.append(Annotations(root / "labels.json", (root / "data", root / "images"), None))
    if not (files := [annotations for annotations in candidates if annotations.file.is_file()]):
        raise UserError(
            f"{root}: neither annotations/instances_NAME.json nor <split>/_annotations.coco.json nor labels.json is "
            "there; see datasets/coco/README.md"
        )
    return files


def split_of(name: str) -> str | None:
    """The split that a name begins with, such as ``val2017``, or None."""
    return next((split for other, split in SPLIT_NAMES.items() if name.lower().startswith(other)), None)


def read_annotations(file: Path) -> dict:
    """Read a file of annotations. UserError unless it has COCO's three lists."""
    content = read_json(file)
    names = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in names):
        raise UserError(f"{file}: no COCO instances, it needs the lists {', '.join(names)}; export it again")
    return content


def check_classes(file: Path, names: dict[Any, str], rules: Rules) -> None:
    """UserError for a class of ``rules`` that the file does not have."""
    if unknown_names := sorted({*map(str.lower, rules.classes or ())} - {*map(str.lower, names.values())}):
        examples = ", ".join(sorted(names.values())[:12])
        raise UserError(
            f"dataset.select.classes: {file} has no class {', '.join(unknown_names)}; it has {examples}, ..."
        )


def is_entry(value: Any, *names: str) -> bool:
    """Whether ``value`` is an object that has ``names``, an id among them that can be looked up."""
    return isinstance(value, dict) and all(name in value for name in names) and is_hashable(value["id"])


# --- rows


def list_instances(annotations: Annotations, content: dict, has_test: bool) -> Iterator[Instance]:
    """Yield the instances of a file; a photograph without one gives an instance without annotation.

    Entries that are no photographs, and annotations of none, are named.
    """
    images = {i["id"]: i for i in content["images"] if is_entry(i, "id", "file_name", "width", "height")}
    objects = [a for a in content["annotations"] if is_entry(a, "id", "image_id") and is_hashable(a["image_id"])]
    objects = [a for a in objects if a["image_id"] in images]
    for name, count in (("images", len(images)), ("annotations", len(objects))):
        if difference := len(content[name]) - count:
            count = len(content[name])
            tell(f"{annotations.file}: {difference} of {count} {name} left out, incomplete, repeated or of no image")
    counts = Counter(a["image_id"] for a in objects)
    paths = {id_: find_photograph(annotations.folders, str(image["file_name"])) for id_, image in images.items()}
    entries = [(images[a["image_id"]], a) for a in objects]
    entries += [(image, {}) for id_, image in images.items() if not counts[id_]]
    for image, annotation in entries:
        stem = Path(str(image["file_name"])).stem
        id_ = stem if counts[image["id"]] < 2 else f"{stem}_{annotation['id']}"
        yield Instance(id_, choose_split(annotations.split, stem, has_test), image, annotation, paths[image["id"]])


def is_hashable(value: Any) -> bool:
    """Whether a foreign value can be looked up: a number or a text."""
    return isinstance(value, int | str)


def choose_split(split: str | None, stem: str, has_test: bool) -> str:
    """The split of a photograph; where there is no test split, that is half of validation, by the hash of the name."""
    if split == "validation" and not has_test:
        return "test" if draw(stem) < 0.5 else split
    return split or draw_split(stem)


def find_photograph(folders: Sequence[Path], name: str) -> Path | None:
    """The file of a photograph: the first that exists, else that in the first folder; None for a bad name."""
    try:
        paths = [path_inside(folder, name) for folder in folders]
    except UserError:
        return None
    return next((path for path in paths if path.is_file()), paths[0])


def duplicate_row(instance: Instance, root: Path) -> dict:
    """The row of an instance that has the name of an earlier one."""
    path = os.path.relpath(instance.photograph, root)
    id_ = f"{instance.id} ({path.replace('/', ' ')}, annotation {instance.annotation.get('id')})"
    return {"split": instance.split, "id": id_, "reason": SAME_NAME, "label": NO_LABEL, "image": path}


def instance_row(instance: Instance, names: dict[Any, str], root: Path, rules: Rules) -> dict:
    """The row of ``COLUMNS`` of an instance, without its mask."""
    image, annotation = instance.image, instance.annotation
    label = names.get(annotation.get("category_id")) if is_hashable(annotation.get("category_id")) else None
    row = {"split": instance.split, "id": instance.id, "label": " ".join((label or NO_LABEL).split())}
    if instance.photograph is None or not is_file_name(instance.id):
        return row | {"reason": BAD_NAME, "image": instance.id.replace("/", "_"), "mask": None}
    row["image"] = os.path.relpath(instance.photograph, root)
    box = fraction_box(annotation.get("bbox"), image)
    if reason := annotation_problem(annotation, box, label, rules):
        return row | {"reason": reason}
    if not instance.photograph.is_file():
        return row | {"reason": "image file missing"}
    return row | {"reason": KEPT, **dict(zip(CORNERS, box, strict=True))}


def write_mask(row: dict, instance: Instance, root: Path, work: Path) -> None:
    """Write the mask of an instance and name it in its row, which gets a reason if the mask cannot be read."""
    drawing = [instance.annotation["segmentation"], instance.image["height"], instance.image["width"]]
    digest = hashlib.sha256(json.dumps(drawing).encode()).hexdigest()[:8]
    path = work / "annotations" / instance.split / f"{instance.id}-{digest}.png"
    row["mask"] = os.path.relpath(path, root)
    try:
        if not path.is_file():
            write_image(path, read_segmentation(*drawing))
    except (ValueError, TypeError, KeyError, IndexError, OverflowError):
        row["reason"] = "mask undecodable"


def fraction_box(box: Any, image: dict) -> tuple[float, ...] | None:
    """The corners of a box x, y, width, height in fractions of its image; None for what is no box in an image."""
    try:
        x, y, w, h = (float(value) for value in box)
        width, height = image["width"], image["height"]
        corners = x / width, y / height, (x + w) / width, (y + h) / height
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        return None
    x0, y0, x1, y1 = (min(max(value, 0.0), 1.0) for value in corners)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def annotation_problem(annotation: dict, box: tuple[float, ...] | None, label: str | None, rules: Rules) -> str | None:
    """The reason for which an annotation cannot be used, or None."""
    if not annotation:
        return "no instance"
    if not annotation.get("segmentation"):
        return "box without mask"
    if box is None or label is None:
        return DAMAGED
    if annotation.get("iscrowd") and not rules.allow_group:
        return "group"
    area = (box[2] - box[0]) * (box[3] - box[1])
    if area < rules.min_area:
        return "too small"
    if rules.classes is not None and label.lower() not in map(str.lower, rules.classes):
        return "class not wanted"
    return None


# --- masks


def read_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask of polygons [[x, y, x, y, ...], ...] or of run lengths {size, counts}, bool H x W. ValueError if wrong.

    Coordinates of polygons are continuous, as pycocotools reads them: the first pixel reaches from 0 to 1.
    """
    if not (isinstance(height, int) and isinstance(width, int) and 0 < height * width <= Image.MAX_IMAGE_PIXELS):
        raise ValueError("size")
    if isinstance(segmentation, dict):
        return read_runs(segmentation, height, width)
    mask = np.zeros((height, width), bool)
    for points in segmentation:
        xy = np.array(points, np.float64).reshape(-1, 2)
        if len(xy) < 3 or not np.isfinite(xy).all():
            raise ValueError("polygon")
        mask[polygon(xy[:, 1] - 0.5, xy[:, 0] - 0.5, mask.shape)] = True
    return mask


def read_runs(segmentation: dict, height: int, width: int) -> np.ndarray:
    """The mask of run lengths down the columns, first of the ground, plain or compressed, bool H x W."""
    counts = segmentation["counts"]
    runs = np.array(expand_runs(counts) if isinstance(counts, str) else counts, np.int64)
    if list(segmentation["size"]) != [height, width] or runs.ndim != 1 or (runs < 0).any():
        raise ValueError("runs")
    if runs.max(initial=0) > height * width or runs.sum() != height * width:
        raise ValueError("length of runs")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def expand_runs(text: str) -> list[int]:
    """The run lengths in COCO's compressed text.

    A number is written in groups of five bits, the lowest first, each a character from ``0`` on; 32 is added where
    another follows, and bit 16 of the last is the sign. From the fourth on, a number is the difference to that two
    before it.
    """
    runs, value, shift = [], 0, 0
    for character in text:
        group = ord(character) - ord("0")
        if not 0 <= group < 64:
            raise ValueError(f"character {character!r}")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return runs


def read_captions(root: Path, splits: Sequence[str]) -> dict[str, list[str]]:
    """COCO's instances have no captions."""
    return {}


def list_places(root: Path, splits: Sequence[str]) -> list[Path]:
    """List the annotations and the photographs, also of splits that may come."""
    folders = [folder for annotations in find_annotations(root) for folder in annotations.folders]
    places = [root / name for name in ("annotations", "labels.json", "images", "data", *SPLIT_NAMES)]
    return [*places, *(folder for folder in folders if not any(folder.is_relative_to(place) for place in places))]


COCO = Source(select_recipe, read_captions, list_places)
