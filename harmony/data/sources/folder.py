"""A user's own photographs and masks, as the same ``Selection`` as Open Images.

``<dir>/images/<name>.<jpg|png|...>`` with ``<dir>/masks/<name>.png`` (white = object) and optionally
``<dir>/captions.json`` ({name: caption}). Splits are drawn from the hash of the name, so that a new image moves no
other; folders ``<dir>/<split>/images`` and ``<dir>/<split>/masks`` set them instead.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from harmony.core.errors import UserError
from harmony.data.sources.files import folder_captions, image_files, locate
from harmony.data.sources.selection import COLUMNS, KEPT, Rules, Selection, Source
from harmony.pixels.images import open_image
from harmony.pixels.masks import bounding_box, read_mask

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
LABEL = "object"
SCHEMA = dict.fromkeys(COLUMNS, pl.String) | dict.fromkeys(("x0", "y0", "x1", "y1"), pl.Float32)


def select_folder(root: Path, splits: Sequence[str], rules: Rules) -> Selection:
    """Every image of the folder with its mask, or the reason why not. Areas are judged later, on the masks themselves.

    Raises UserError where there is no ``images`` folder, or no image in it.
    """
    rows = [row for split, folder in split_folders(root, splits) for row in folder_rows(root, folder, split)]
    if not rows:
        raise UserError(f"{root}: no images found; put photographs into images/ and masks of the same name into masks/")
    table = pl.DataFrame(rows, schema=SCHEMA, orient="row").filter(pl.col("split").is_in(list(splits)))
    return Selection(root, table.sort("split", "id"), rules)


def split_folders(root: Path, splits: Sequence[str]) -> Iterator[tuple[str | None, Path]]:
    """(split, folder) for each split folder; (None, root) where the hash of the name decides."""
    if (root / "images").is_dir():
        yield None, root
        return
    folders = [split for split in splits if (root / split / "images").is_dir()]
    if not folders:
        raise UserError(f"{root}: neither images/ nor <split>/images/ there; see datasets/folder/README.md")
    yield from ((split, root / split) for split in folders)


def folder_rows(root: Path, folder: Path, split: str | None) -> Iterator[tuple]:
    """One row of ``COLUMNS`` an image file."""
    for image in image_files(folder / "images"):
        mask = folder / "masks" / f"{image.stem}.png"
        reason, box = mask_box(image, mask)
        paths = (str(image.relative_to(root)), str(mask.relative_to(root)))
        yield (split or draw_split(image.stem), image.stem, reason, LABEL, *box, *paths, None)


def mask_box(image: Path, mask: Path) -> tuple[str, tuple[float | None, ...]]:
    """(``kept`` or a reason, box of the mask in fractions of the image)."""
    nothing = (None,) * 4
    if not mask.is_file():
        return "mask file missing", nothing
    try:
        size = open_image(image).size
    except UserError:
        return "image undecodable", nothing
    try:
        if open_image(mask, "mask").size != size:
            return "mask shape differs", nothing
        x0, y0, x1, y1 = bounding_box(read_mask(mask, size))
    except UserError as error:
        return ("mask empty" if "empty" in str(error) else "mask undecodable"), nothing
    return KEPT, (x0 / size[0], y0 / size[1], x1 / size[0], y1 / size[1])


def draw_split(name: str) -> str:
    """A split by the hash of the name, in the proportions of ``SHARES``."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    for split, share in SHARES.items():
        if (draw := draw - share) < 0:
            return split
    return "test"


def select_recipe(recipe: dict, work: Path) -> Selection:
    """The selection of a recipe; ``work`` is not needed."""
    return select_folder(locate(recipe), recipe["splits"], Rules(**recipe["select"]))


def read_captions(root: Path, split: str) -> dict[str, list[str]]:
    """Captions by people: {name: [caption, ...]}, those of the split's folder or of the whole folder."""
    return folder_captions(root if (root / "images").is_dir() else root / split)


FOLDER = Source(select_recipe, read_captions)
