"""Photographs of an Open Images folder with exactly one usable instance: one streaming pass over the tables.

Selection comes before anything is downloaded, decoded or imported. Memory grows with the number of images, never with
the number of annotation rows. Every image gets one reason, the first of ``REASONS`` that applies, or ``kept``.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from harmony.core.errors import UserError
from harmony.data.sources.open_images.layout import CORNERS, FLAGS, Split, find_splits, image_path, mask_path
from harmony.data.sources.selection import KEPT, Rules, Selection, check_files, read_ids


def select(root: Path, splits: Sequence[str], rules: Rules, files: bool = True) -> Selection:
    """Select the single-instance images of ``root/<split>`` for each split.

    ``files=False`` does not look for the files, as before a download, when none is there yet.
    Raises UserError for a missing split, CSV or column.
    """
    tables, skipped = [], {}
    for split in find_splits(root, splits):
        table, damaged = select_split(split, rules)
        tables.append(check_files(table, root) if files else table)
        skipped |= damaged
    return Selection(root, pl.concat(tables), rules, skipped)


def select_split(split: Split, rules: Rules) -> tuple[pl.DataFrame, dict[str, int]]:
    """The annotation and recipe rules for one split: (table with ``COLUMNS``, damaged rows per CSV)."""
    images = join_annotations(split)
    damaged = {
        f"{split.name}/labels/{name}": n
        for name, column in (("detections.csv", "damaged_boxes"), ("segmentations.csv", "damaged_masks"))
        if (n := int(images[column].sum()))
    }
    images = images.filter(pl.col("ImageID").is_not_null())  # a line cut before its id is counted above, and no image
    images = images.with_columns(reason=first_reason(rules, class_ids(split, rules.classes), read_ids(rules)))
    images = limit_samples(images.sort("ImageID"), rules.max_samples)
    single = pl.col("boxes") == 1
    table = images.select(
        split=pl.lit(split.name),
        id="ImageID",
        reason="reason",
        label=pl.when(single).then(pl.col("label").replace(split.class_names())),
        x0=pl.when(single).then("XMin"),
        y0=pl.when(single).then("YMin"),
        x1=pl.when(single).then("XMax"),
        y1=pl.when(single).then("YMax"),
        image=pl.format("{}/{}", pl.lit(split.name), image_path()),
        mask=pl.when(pl.col("masks") == 1).then(pl.format("{}/{}", pl.lit(split.name), mask_path())),
        source="source",
    )
    return table, damaged


def join_annotations(split: Split) -> pl.DataFrame:
    """One row an image: its boxes and masks counted, and the first of each. The only pass over the tables, streamed.

    A mask belongs to a box by (ImageID, LabelName, corners). Where an image has one box and one mask, as every kept
    image has, (ImageID, LabelName) alone decides, so rounding of the corners cannot lose a pair.
    """
    boxes = (
        split.boxes()
        .group_by("ImageID")
        .agg(
            pl.len().alias("boxes"),
            pl.col("damaged").sum().alias("damaged_boxes"),
            pl.col("LabelName").first().alias("label"),
            pl.col(*CORNERS).first(),
            pl.col(*FLAGS).max(),
        )
    )
    masks = (
        split.masks()
        .group_by("ImageID")
        .agg(
            pl.len().alias("masks"),
            pl.col("damaged").sum().alias("damaged_masks"),
            pl.col("LabelName").first().alias("mask_label"),
            pl.col("MaskPath").first(),
        )
    )
    counters = ("boxes", "masks", "damaged_boxes", "damaged_masks")
    images = boxes.join(masks, on="ImageID", how="full", coalesce=True, nulls_equal=True)
    if (ids := split.image_ids()) is not None:
        images = images.join(ids, on="ImageID", how="full", coalesce=True, nulls_equal=True)
    if (sources := split.sources()) is not None:
        images = images.join(sources, on="ImageID", how="left")
    else:
        images = images.with_columns(source=pl.lit(None, pl.String))
    return images.with_columns(pl.col(*counters).fill_null(0)).collect(engine="streaming")


def first_reason(rules: Rules, classes: set[str] | None, ids: set[str] | None) -> pl.Expr:
    """The first rule that an image breaks, or ``kept``. Flags of -1 mean "not known" and reject nothing."""
    boxes, masks = pl.col("boxes"), pl.col("masks")
    area = (pl.col("XMax") - pl.col("XMin")) * (pl.col("YMax") - pl.col("YMin"))
    never = pl.lit(False)
    from_sources = pl.col("source").is_in(list(rules.sources or ())).fill_null(False)
    conditions = {
        "damaged row": pl.col("damaged_boxes") + pl.col("damaged_masks") > 0,
        "no instance": (boxes == 0) & (masks == 0),
        "several instances": boxes > 1,
        "box without mask": masks == 0,
        "several masks": masks > 1,
        "mask without box": boxes == 0,
        "mask of another class": pl.col("label") != pl.col("mask_label"),
        "group": never if rules.allow_group else pl.col("IsGroupOf") > 0,
        "depiction": never if rules.allow_depiction else pl.col("IsDepiction") > 0,
        "truncated": never if rules.allow_truncated else pl.col("IsTruncated") > 0,
        "inside view": never if rules.allow_inside else pl.col("IsInside") > 0,
        "too small": area < rules.min_area,
        "too large": area > rules.max_area,
        "class not wanted": never if classes is None else ~pl.col("label").is_in(list(classes)),
        "source not wanted": never if rules.sources is None else ~from_sources,
        "id not listed": never if ids is None else ~pl.col("ImageID").is_in(list(ids)),
    }
    broken = [pl.when(condition).then(pl.lit(reason)) for reason, condition in conditions.items()]
    return pl.coalesce(*broken, pl.lit(KEPT))


def limit_samples(images: pl.DataFrame, limit: int | None) -> pl.DataFrame:
    """Keep the first ``limit`` images in the order of their ids, a random draw since Open Images ids are random."""
    if limit is None:
        return images
    is_kept = pl.col("reason") == KEPT
    over = is_kept & (is_kept.cum_sum() > limit)
    return images.with_columns(reason=pl.when(over).then(pl.lit("over max_samples")).otherwise("reason"))


def class_ids(split: Split, classes: Sequence[str] | None) -> set[str] | None:
    """Machine ids of classes, which have names or machine ids. UserError for a name that the dataset does not have."""
    if classes is None:
        return None
    by_name = {name.lower(): mid for mid, name in split.class_names().items()}
    known = set(by_name.values())
    if unknown := [c for c in classes if c.lower() not in by_name and c not in known]:
        raise UserError(
            f"dataset.select.classes: {split.folder} has no class {', '.join(unknown)}; "
            f"it has {', '.join(sorted(by_name)[:12])}, ... (metadata/classes.csv)"
        )
    return {by_name.get(c.lower(), c) for c in classes}
