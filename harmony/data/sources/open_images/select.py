"""Selection of Open Images photographs with exactly one usable instance, in one pass over each table.

The selection comes before any download, decoding or import. Memory grows with the number of images, not with the number
of annotation rows. Every image gets one reason, the first of ``REASONS`` that applies, or ``kept``.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from harmony.core.errors import UserError
from harmony.data.sources.open_images.layout import CORNERS, FLAGS, Split, find_splits, has_bad_name, mask_path
from harmony.data.sources.open_images.skim import skim_boxes
from harmony.data.sources.selection import (
    BAD_NAME,
    COLUMNS,
    KEPT,
    Rules,
    Selection,
    check_files,
    limit_samples,
    read_ids,
)


def select(root: Path, splits: Sequence[str], rules: Rules, files: bool = True) -> Selection:
    """Select the single-instance images of ``root/<split>`` for each split.

    ``files=False`` does not check the files, for a selection before the download.
    Raises UserError for a missing split, CSV or column.
    """
    tables, damage_counts = [], {}
    for split in find_splits(root, splits):
        table, counts = select_split(split, rules)
        tables.append(check_files(table, root) if files else table)
        damage_counts |= counts
    return Selection(root, pl.concat(tables), rules, damage_counts)


def select_split(split: Split, rules: Rules) -> tuple[pl.DataFrame, dict[str, int]]:
    """Apply the annotation and recipe rules to one split: (table with ``COLUMNS``, damaged rows per CSV)."""
    reason = first_reason(rules, class_ids(split, rules.classes), read_ids(rules))
    table = tabulate(join_annotations(split), split, reason).collect(engine="streaming")
    damage_counts = {
        f"{split.folder.name}/labels/{name}": n
        for name, column in (("detections.csv", "damaged_boxes"), ("segmentations.csv", "damaged_masks"))
        if (n := int(table[column].sum()))
    }
    table = table.filter(pl.col("id").is_not_null())  # a line without an id is counted above and is no image
    return limit_samples(table.select(COLUMNS), rules.max_samples), damage_counts


def tabulate(images: pl.LazyFrame, split: Split, reason: pl.Expr) -> pl.LazyFrame:
    """Make the table of a selection from joined annotations, sorted by id, with the numbers of damaged rows."""
    has_one_box = pl.col("boxes") == 1
    return images.select(
        "damaged_boxes",
        "damaged_masks",
        split=pl.lit(split.name),
        id="ImageID",
        reason=reason,
        label=pl.when(has_one_box).then(pl.col("label").replace(split.class_names())),
        x0=pl.when(has_one_box).then("XMin"),
        y0=pl.when(has_one_box).then("YMin"),
        x1=pl.when(has_one_box).then("XMax"),
        y1=pl.when(has_one_box).then("YMax"),
        image=split.image_path(),
        mask=pl.when(pl.col("masks") == 1).then(pl.format("{}/{}", pl.lit(split.folder.name), mask_path())),
        source="source",
    ).sort("id")


def join_annotations(split: Split) -> pl.LazyFrame:
    """Join the tables to one row for each image: numbers of boxes and masks, and the box or mask where it is one.

    This is the only pass over the tables. A mask belongs to a box by (ImageID, LabelName, corners). If an image has one
    box and one mask, as every kept image, (ImageID, LabelName) is enough, so that rounding of the corners cannot lose a
    pair.
    """
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
    boxes = summarize_boxes(split).rename({"LabelName": "label"})
    images = boxes.join(masks, on="ImageID", how="full", coalesce=True, nulls_equal=True)
    if (ids := split.image_ids()) is not None:
        images = images.join(ids, on="ImageID", how="full", coalesce=True, nulls_equal=True)
    if (sources := split.sources()) is not None:
        images = images.join(sources, on="ImageID", how="left")
    else:
        images = images.with_columns(source=pl.lit(None, pl.String))
    return images.with_columns(pl.col(*counters).fill_null(0))


def summarize_boxes(split: Split) -> pl.LazyFrame:
    """One row for each image: its number of boxes and of damaged ones, and the box where it is one.

    The boxes are grouped where they cannot be skimmed.
    """
    boxes = split.boxes()
    if (images := skim_boxes(split.box_file)) is not None:
        return images.lazy()
    counts = (pl.len().alias("boxes"), pl.col("damaged").sum().alias("damaged_boxes"))
    return boxes.group_by("ImageID").agg(*counts, pl.col("LabelName", *CORNERS, *FLAGS).first())


def first_reason(rules: Rules, classes: set[str] | None, ids: set[str] | None) -> pl.Expr:
    """The first rule that an image violates, or ``kept``. Flags of -1 mean "unknown" and reject nothing."""
    boxes, masks = pl.col("boxes"), pl.col("masks")
    area = (pl.col("XMax") - pl.col("XMin")) * (pl.col("YMax") - pl.col("YMin"))
    no_image = pl.lit(False)
    has_source = pl.col("source").is_in(list(rules.sources or ())).fill_null(False)
    conditions = {
        BAD_NAME: has_bad_name(),
        "damaged row": pl.col("damaged_boxes") + pl.col("damaged_masks") > 0,
        "no instance": (boxes == 0) & (masks == 0),
        "several instances": boxes > 1,
        "box without mask": masks == 0,
        "several masks": masks > 1,
        "mask without box": boxes == 0,
        "mask of another class": pl.col("label") != pl.col("mask_label"),
        "group": no_image if rules.allow_group else pl.col("IsGroupOf") > 0,
        "depiction": no_image if rules.allow_depiction else pl.col("IsDepiction") > 0,
        "truncated": no_image if rules.allow_truncated else pl.col("IsTruncated") > 0,
        "inside view": no_image if rules.allow_inside else pl.col("IsInside") > 0,
        "too small": area < rules.min_area,
        "too large": area > rules.max_area,
        "class not wanted": no_image if classes is None else ~pl.col("label").is_in(list(classes)),
        "source not wanted": no_image if rules.sources is None else ~has_source,
        "id not listed": no_image if ids is None else ~pl.col("ImageID").is_in(list(ids)),
    }
    reasons = [pl.when(condition).then(pl.lit(reason)) for reason, condition in conditions.items()]
    return pl.coalesce(*reasons, pl.lit(KEPT))


def class_ids(split: Split, classes: Sequence[str] | None) -> set[str] | None:
    """Convert class names or machine ids to machine ids. UserError for a class that the dataset does not have."""
    if classes is None:
        return None
    by_name = {name.lower(): mid for mid, name in split.class_names().items()}
    ids = set(by_name.values())
    if unknown_classes := [c for c in classes if c.lower() not in by_name and c not in ids]:
        raise UserError(
            f"dataset.select.classes: {split.folder} has no class {', '.join(unknown_classes)}; "
            f"it has {', '.join(sorted(by_name)[:12])}, ... (metadata/classes.csv)"
        )
    return {by_name.get(c.lower(), c) for c in classes}
