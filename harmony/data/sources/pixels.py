"""The pixels a kit is trained on: studio renders under both of their lights, and photographs whose licence allows
it.

``prepare_kit`` gathers them into one manifest; ``PixelPool`` holds the decoded pictures in memory and hands out
squares.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from harmony.core.errors import UserError
from harmony.core.row import SPLITS, Row
from harmony.data.captions import given_captions
from harmony.data.manifest import write_manifest
from harmony.pixels.images import read_image, sha256
from harmony.pixels.masks import bounding_box, read_mask

AREA = (0.02, 0.8)  # share of the photograph that an instance may cover, as everywhere in the project


def largest_masks(folder: Path) -> dict[str, tuple[str, str]]:
    """Image id -> (mask file, label) of the largest annotated box within AREA, whatever else the picture shows."""
    import polars as pl  # not where a manifest is there already

    from harmony.data.sources.open_images.select import class_names

    table = pl.read_csv(folder / "labels" / "segmentations.csv").with_columns(
        area=(pl.col("BoxXMax") - pl.col("BoxXMin")) * (pl.col("BoxYMax") - pl.col("BoxYMin"))
    )
    table = table.filter(pl.col("area").is_between(*AREA)).sort("area", descending=True).unique("ImageID", keep="first")
    names = class_names(folder)
    return {
        image: (f"labels/masks/{image[0].upper()}/{mask}", names.get(label, label))
        for image, mask, label in table.select("ImageID", "MaskPath", "LabelName").iter_rows()
    }


def rows_of(folder: Path, split: str, relative_to: Path, sources: Iterable[str] | None = None) -> list[Row]:
    """Rows of one split folder in Open Images layout; unreadable pictures and masks are left out.

    A studio scene gives two rows: under its light A and, with the matching caption, under its light B; the ``relit``
    picture of either is the other.
    """
    captions = given_captions(folder)
    wanted = None
    if sources is not None:
        import polars as pl

        table = pl.read_csv(folder / "metadata" / "sources.csv", columns=["ImageID", "Source"])
        wanted = set(table.filter(pl.col("Source").is_in(list(sources)))["ImageID"])
    extras = {"source": "studio"} if (folder / "metadata" / "scenes.csv").exists() else {}
    rows = []
    for image, (mask_file, label) in sorted(largest_masks(folder).items()):
        if wanted is not None and image not in wanted:
            continue
        path = folder / "data" / f"{image}.jpg"
        try:
            height, width = read_image(path).shape[:2]
            mask = read_mask(folder / mask_file, (width, height), resize=True)
        except UserError:
            continue
        words = captions.get(image) or [f"a photo of a {label.lower()}"]
        box = tuple(float(v) for v in bounding_box(mask))
        relit = folder / "relit" / f"{image}.jpg"
        pictures = [(image, path, words[0])] + ([(f"{image}b", relit, words[1])] if relit.exists() else [])
        for i, (name, picture, caption) in enumerate(pictures):
            where = [os.path.relpath(p, relative_to) for p in (picture, folder / mask_file)]
            other = {"relit": os.path.relpath(pictures[1 - i][1], relative_to)} if len(pictures) == 2 else {}
            facts = (box, label, caption, split, width, height, sha256(picture), extras | other)
            rows.append(Row(name, *where, *facts))
    return rows


def prepare_kit(recipe: dict, work: Path) -> Path:
    """Render what is missing and write ``manifest.jsonl`` of the kit's training set into ``work / name``.

    Recipe: ``name``, ``dir`` (the bundled studio set), ``count`` (further studio scenes at the kit's size, train
    split), ``size`` in pixels, ``photos`` (a folder in Open Images layout, or null) and ``sources`` (which of its
    photographs may train shipped weights; its test split is used for measuring alone and may hold any).
    """
    from harmony.data.sources.studio import generate

    folder = work / recipe["name"]
    renders = generate(folder / "studio", recipe["count"], recipe["size"], start=512, splits=("train",), plate=False)
    rows: list[Row] = []
    for split in SPLITS:
        rows += rows_of(Path(recipe["dir"]) / split, split, folder)
        if (renders / split).is_dir():
            rows += rows_of(renders / split, split, folder)
        if recipe["photos"]:
            sources = None if split == "test" else recipe["sources"]
            rows += rows_of(Path(recipe["photos"]) / split, split, folder, sources)
    write_manifest(folder / "manifest.jsonl", rows, recipe["name"])
    return folder / "manifest.jsonl"
