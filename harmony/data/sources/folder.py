"""A user's photographs and masks as a ``Selection``, like those of Open Images.

``<dir>/images/<name>.<jpg|png|...>`` with ``<dir>/masks/<name>.<png|jpg|...>`` (white = object) and optionally
``<dir>/captions.json`` ({name: caption}). The split of an image is drawn from the hash of its name, so that new images
do not change the splits of others; of three images or more no split stays empty. Folders ``<dir>/<split>/images`` and
``<dir>/<split>/masks`` set the splits. Files that belong to nothing are named.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from harmony.core.errors import UserError
from harmony.core.foreign import is_file_name
from harmony.core.row import SPLITS
from harmony.data.captions import NO_LABEL
from harmony.data.sources.files import (
    SPLIT_NAMES,
    folder_captions,
    image_files,
    locate,
    split_folder,
    tell_omissions,
)
from harmony.data.sources.selection import (
    BAD_NAME,
    COLUMNS,
    CORNERS,
    KEPT,
    SAME_NAME,
    Rules,
    Selection,
    Source,
    area_reason,
)
from harmony.pixels.images import SUFFIXES, open_image
from harmony.pixels.masks import EmptyMaskError, bounding_box, read_mask

SHARES = {"train": (0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1)}  # the interval of draws of each split
SCHEMA = dict.fromkeys(COLUMNS, pl.String) | dict.fromkeys(CORNERS, pl.Float32)


def select_folder(root: Path, splits: Sequence[str], rules: Rules) -> Selection:
    """Select all images of the folder that have a usable mask; the others get a reason.

    Raises UserError if there is no ``images`` folder, or no image in it.
    """
    folders = split_folders(root, splits)
    rows = [row for split, folder in folders.items() for row in folder_rows(root, folder, split, rules)]
    if not rows:
        raise UserError(f"{root}: no images found; put photographs into images/ and masks of the same name into masks/")
    table = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    if None in folders:
        drawn_splits = draw_splits(table.filter(pl.col("reason") == KEPT)["id"].to_list())
        drawn_splits |= {name: draw_split(name) for name in table["id"] if name not in drawn_splits}
        table = table.with_columns(split=pl.col("id").replace_strict(drawn_splits, return_dtype=pl.String))
    return Selection(root, table.filter(pl.col("split").is_in(list(splits))).sort("split", "id"), rules)


def split_folders(root: Path, splits: Sequence[str]) -> dict[str | None, Path]:
    """The folder of each split; {None: root} if the names decide the splits. Other folders with images are named."""
    if (root / "images").is_dir():
        folders, known_folders = {None: root}, [root]
    else:
        known_folders = [split_folder(root, split) for split in SPLITS]
        folders = {split: split_folder(root, split) for split in splits}
        folders = {split: folder for split, folder in folders.items() if (folder / "images").is_dir()}
    if not folders:
        raise UserError(f"{root}: neither images/ nor <split>/images/ there; see datasets/folder/README.md")
    others = [path.name for path in sorted(root.iterdir()) if (path / "images").is_dir() and path not in known_folders]
    tell_omissions(f"{root}: folders with images beside those of the dataset", others)
    return folders


def folder_rows(root: Path, folder: Path, split: str | None, rules: Rules) -> Iterator[tuple]:
    """Yield a row of ``COLUMNS`` for each image file; name the files that are no image, and masks of no image."""
    images, masks, names = image_files(folder / "images"), mask_files(folder / "masks"), set()
    for image in images:
        mask = masks.get(image.stem, folder / "masks" / f"{image.stem}.png")
        name, no_box = image.stem, (None,) * 4
        if not is_file_name(image.name):
            name, reason, box = image.name.encode(errors="replace").decode(), BAD_NAME, no_box
            image, mask = (path.with_name(name) for path in (image, mask))
        elif name in names:
            name, reason, box = image.name, SAME_NAME, no_box
        else:
            reason, box = mask_box(image, mask, rules)
        names.add(name)
        yield (split, name, reason, NO_LABEL, *box, str(image.relative_to(root)), str(mask.relative_to(root)), None)
    others = [path.name for path in sorted((folder / "images").iterdir()) if path not in images]
    others = [name for name in others if not name.startswith(".") and name != "Thumbs.db"]
    tell_omissions(f"{folder / 'images'}: no pictures ({', '.join(SUFFIXES)})", others)
    stems = {image.stem for image in images}
    tell_omissions(f"{folder / 'masks'}: masks of no image", [m.name for stem, m in masks.items() if stem not in stems])


def mask_files(folder: Path) -> dict[str, Path]:
    """Map names to mask files; where a name has several, the PNG holds and the others are named."""
    files = image_files(folder) if folder.is_dir() else []
    masks = {}
    for path in sorted(files, key=lambda path: path.suffix.lower() != ".png"):
        masks.setdefault(path.stem, path)
    tell_omissions(f"{folder}: further masks of one name", [path.name for path in files if masks[path.stem] != path])
    return masks


def mask_box(
    image: Path, mask: Path, rules: Rules, size: tuple[int, int] | None = None
) -> tuple[str, tuple[float | None, ...]]:
    """Return (``kept`` or a reason, box of the mask in fractions of the image).

    ``size``: the image's width and height in px, where they are known already.
    """
    no_box = (None,) * 4
    if not mask.is_file():
        return "mask file missing", no_box
    try:
        size = size or open_image(image).size
    except UserError:
        return "image undecodable", no_box
    try:
        if open_image(mask, "mask").size != size:
            return "mask shape differs", no_box
        pixels = read_mask(mask, size)
        x0, y0, x1, y1 = bounding_box(pixels)
    except UserError as error:
        return ("mask empty" if isinstance(error, EmptyMaskError) else "mask undecodable"), no_box
    return area_reason(float(pixels.mean()), rules), (x0 / size[0], y0 / size[1], x1 / size[0], y1 / size[1])


def draw(name: str) -> float:
    """Draw a number in [0, 1) by the hash of the name."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()[:8], "big") / 2**64


def draw_split(name: str) -> str:
    """Draw a split by the hash of the name, in the proportions of ``SHARES``."""
    return next((split for split, (_, end) in SHARES.items() if draw(name) < end), "test")


def draw_splits(names: Sequence[str]) -> dict[str, str]:
    """Draw the split of each name; of three names or more, a split that drew none gets the nearest of the largest."""
    splits = {name: draw_split(name) for name in names}
    for split, (start, end) in SHARES.items():
        if len(names) >= len(SHARES) and split not in splits.values():
            largest = Counter(splits.values()).most_common(1)[0][0]
            candidates = [name for name in names if splits[name] == largest]
            splits[min(candidates, key=lambda name: abs(draw(name) - (start + end) / 2))] = split  # noqa: B023
    return splits


def select_recipe(recipe: dict, work: Path) -> Selection:
    """Select the images of a recipe; ``work`` is not used."""
    return select_folder(locate(recipe), recipe["splits"], Rules.of(recipe["select"]))


def read_captions(root: Path, splits: Sequence[str]) -> dict[str, list[str]]:
    """Read captions by people, {<split>/<name>: [caption, ...]}, from the root and from the folders of splits."""
    folders = {split: root if (root / "images").is_dir() else split_folder(root, split) for split in splits}
    folders = {split: folder for split, folder in folders.items() if (folder / "images").is_dir()}
    names = {split: {path.stem for path in image_files(folder / "images")} for split, folder in folders.items()}
    shared = folder_captions(root, set().union(*names.values()))
    captions = {}
    for split, folder in folders.items():
        texts = shared if folder == root else shared | folder_captions(folder, names[split])
        captions |= {f"{split}/{name}": texts[name] for name in names[split] & set(texts)}
    return captions


def list_places(root: Path, splits: Sequence[str]) -> list[Path]:
    """List the folders of images and masks and the captions, also of splits that may come."""
    folders = ["", *SPLIT_NAMES]
    return [root / folder / name for folder in folders for name in ("images", "masks", "captions.json")]


FOLDER = Source(select_recipe, read_captions, list_places)
