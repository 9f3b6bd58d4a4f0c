"""A user's photographs and masks as a ``Selection``, like those of Open Images.

``<dir>/images/<name>.<jpg|png|...>`` with ``<dir>/masks/<name>.png`` (white = object) and optionally
``<dir>/captions.json`` ({name: caption}). The split of an image is drawn from the hash of its name, so that new
images do not change the splits of others; folders ``<dir>/<split>/images`` and ``<dir>/<split>/masks`` set the splits.
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
    """Select all images of the folder that have a usable mask; the others get a reason. Areas are checked later.

    Raises UserError if there is no ``images`` folder, or no image in it.
    """
    rows = [row for split, folder in split_folders(root, splits) for row in folder_rows(root, folder, split)]
    if not rows:
        raise UserError(f"{root}: no images found; put photographs into images/ and masks of the same name into masks/")
    table = pl.DataFrame(rows, schema=SCHEMA, orient="row").filter(pl.col("split").is_in(list(splits)))
    return Selection(root, table.sort("split", "id"), rules)


def split_folders(root: Path, splits: Sequence[str]) -> Iterator[tuple[str | None, Path]]:
    """Yield (split, folder) for each split folder, or (None, root) if the names decide the splits."""
    if (root / "images").is_dir():
        yield None, root
        return
    folders = [split for split in splits if (root / split / "images").is_dir()]
    if not folders:
        raise UserError(f"{root}: neither images/ nor <split>/images/ there; see datasets/folder/README.md")
    yield from ((split, root / split) for split in folders)


def folder_rows(root: Path, folder: Path, split: str | None) -> Iterator[tuple]:
    """Yield a row of ``COLUMNS`` for each image file."""
    for image in image_files(folder / "images"):
        mask = folder / "masks" / f"{image.stem}.png"
        reason, box = mask_box(image, mask)
        paths = (str(image.relative_to(root)), str(mask.relative_to(root)))
        yield (split or draw_split(image.stem), image.stem, reason, LABEL, *box, *paths, None)


def mask_box(image: Path, mask: Path) -> tuple[str, tuple[float | None, ...]]:
    """Return (``kept`` or a reason, box of the mask in fractions of the image)."""
    no_box = (None,) * 4
    if not mask.is_file():
        return "mask file missing", no_box
    try:
        size = open_image(image).size
    except UserError:
        return "image undecodable", no_box
    try:
        if open_image(mask, "mask").size != size:
            return "mask shape differs", no_box
        x0, y0, x1, y1 = bounding_box(read_mask(mask, size))
    except UserError as error:
        return ("mask empty" if "empty" in str(error) else "mask undecodable"), no_box
    return KEPT, (x0 / size[0], y0 / size[1], x1 / size[0], y1 / size[1])


def draw_split(name: str) -> str:
    """Draw a split by the hash of the name, in the proportions of ``SHARES``."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    for split, share in SHARES.items():
        if (draw := draw - share) < 0:
            return split
    return "test"


def select_recipe(recipe: dict, work: Path) -> Selection:
    """Select the images of a recipe; ``work`` is not used."""
    return select_folder(locate(recipe), recipe["splits"], Rules.of(recipe["select"]))


def read_captions(root: Path, split: str) -> dict[str, list[str]]:
    """Read captions by people, {name: [caption, ...]}, from the split's folder or from the root."""
    return folder_captions(root if (root / "images").is_dir() else root / split)


FOLDER = Source(select_recipe, read_captions)
