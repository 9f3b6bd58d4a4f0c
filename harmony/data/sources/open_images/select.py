"""Which photographs of an Open Images folder hold exactly one usable instance: one streaming pass over the CSVs.

Selection comes before anything is downloaded, decoded or imported. Memory grows with the number of images, never with
the number of annotation rows. Every image ends with one reason, the first of ``REASONS`` that applies, or ``kept``.

Layout of a split: ``data/<ImageID>.jpg``, ``labels/{detections,segmentations}.csv``, ``labels/masks/<HEX>/<MaskPath>``,
``metadata/classes.csv`` (MID, name, no header) and, where present, ``image_ids.csv`` and ``sources.csv``; the metadata
may lie one level up. Boxes are fractions of the image.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import polars as pl

from harmony.core.errors import UserError

KEPT = "kept"
REASONS = (
    # annotation: exactly one instance with exactly one mask
    "damaged row",
    "no instance",
    "several instances",
    "box without mask",
    "several masks",
    "mask without box",
    "mask of another class",
    # rules of the recipe
    "group",
    "depiction",
    "truncated",
    "inside view",
    "too small",
    "too large",
    "class not wanted",
    "source not wanted",
    "id not listed",
    "over max_samples",
    # files
    "image file missing",
    "mask file missing",
    # pixels, found when the manifest is made
    "image undecodable",
    "mask undecodable",
    "mask empty",
    "mask shape differs",
    "mask area too small",
    "mask area too large",
)
ANNOTATION_REASONS = REASONS[:7]

DETECTION_COLUMNS = {
    "ImageID": pl.String,
    "LabelName": pl.String,
    "XMin": pl.Float32,
    "XMax": pl.Float32,
    "YMin": pl.Float32,
    "YMax": pl.Float32,
    "IsTruncated": pl.Int8,
    "IsGroupOf": pl.Int8,
    "IsDepiction": pl.Int8,
    "IsInside": pl.Int8,
}
SEGMENTATION_COLUMNS = {
    "MaskPath": pl.String,
    "ImageID": pl.String,
    "LabelName": pl.String,
    "BoxXMin": pl.Float32,
    "BoxXMax": pl.Float32,
    "BoxYMin": pl.Float32,
    "BoxYMax": pl.Float32,
}
FULL_HEADER = {
    "detections.csv": "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside",
    "segmentations.csv": "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks",
}
COLUMNS = ("split", "id", "reason", "label", "x0", "y0", "x1", "y1", "image", "mask", "source")


@dataclass(frozen=True)
class Rules:
    """Thresholds of a recipe's ``select``. Areas are fractions of the image; None switches a list off."""

    min_area: float = 0.02
    max_area: float = 0.8
    allow_group: bool = False
    allow_depiction: bool = False
    allow_truncated: bool = False
    allow_inside: bool = False
    classes: Sequence[str] | None = None
    sources: Sequence[str] | None = None
    image_ids: Sequence[str] | str | None = None
    max_samples: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_area < self.max_area <= 1:
            raise UserError(
                f"dataset.select: min_area {self.min_area} and max_area {self.max_area} must satisfy "
                "0 <= min_area < max_area <= 1"
            )
        if self.max_samples is not None and self.max_samples < 1:
            raise UserError(f"dataset.select.max_samples is {self.max_samples}; give a number of at least 1, or null")


@dataclass(frozen=True)
class Selection:
    """One row an image in ``table`` (columns ``COLUMNS``, paths relative to ``root``), damaged CSV rows in ``skipped``.

    ``x0, y0, x1, y1`` is the box in fractions of the image. Label, box and mask are null where there is no single one.
    """

    root: Path
    table: pl.DataFrame
    rules: Rules
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> pl.DataFrame:
        return self.table.filter(pl.col("reason") == KEPT)

    def counts(self) -> dict[str, dict[str, int]]:
        """Images per split and reason, ``kept`` first, then in the order of ``REASONS``."""
        return count_reasons(self.table)

    def digest(self) -> str:
        """Hash of rules and decisions, wherever the folder lies."""
        rules = json.dumps(asdict(self.rules), default=list, sort_keys=True)
        return hashlib.sha256(rules.encode() + self.table.write_csv().encode()).hexdigest()


def count_reasons(table: pl.DataFrame) -> dict[str, dict[str, int]]:
    """``{split: {reason: images}}`` of a table with the columns ``split`` and ``reason``."""
    found = {(split, reason): n for split, reason, n in table.group_by("split", "reason").len().iter_rows()}
    return {
        split: {r: found[split, r] for r in (KEPT, *REASONS) if (split, r) in found}
        for split in table["split"].unique(maintain_order=True)
    }


def format_counts(counts: dict[str, dict[str, int]]) -> str:
    """The counts as a small table: a row a reason, a column a split."""
    reasons = [r for r in (KEPT, *REASONS) if any(r in c for c in counts.values())]
    rows = [("", *counts)] + [(r, *(str(c.get(r, 0)) for c in counts.values())) for r in reasons]
    rows.append(("all", *(str(sum(c.values())) for c in counts.values())))
    return "\n".join(f"{first:<22}" + "".join(f"{cell:>12}" for cell in rest) for first, *rest in rows)


def select(root: Path, splits: Sequence[str], rules: Rules, files: bool = True) -> Selection:
    """Select the single-instance images of ``root/<split>`` for each split.

    ``files=False`` leaves out the look at the disk: right before a download, when nothing is there yet.
    Raises UserError for a missing split, CSV or column.
    """
    tables, skipped = [], {}
    for split in splits:
        folder = root / split
        if not folder.is_dir():
            raise UserError(f"{folder}: no such split; set dataset.dir to a folder that holds {', '.join(splits)}")
        table, damaged = select_split(folder, split, rules)
        tables.append(check_files(table, root) if files else table)
        skipped |= damaged
    return Selection(root, pl.concat(tables), rules, skipped)


def select_split(folder: Path, split: str, rules: Rules) -> tuple[pl.DataFrame, dict[str, int]]:
    """The annotation and recipe rules for one split: (table with ``COLUMNS``, damaged rows per CSV)."""
    images = join_annotations(folder)
    unreadable = {
        f"{split}/labels/{name}": n
        for name, column in (("detections.csv", "damaged_boxes"), ("segmentations.csv", "damaged_masks"))
        if (n := int(images[column].sum()))
    }
    images = images.filter(pl.col("ImageID").is_not_null())  # a line cut before its id is counted above, and no image
    images = images.with_columns(reason=first_reason(rules, class_ids(folder, rules.classes), listed_ids(rules)))
    images = limit_samples(images.sort("ImageID"), rules.max_samples)
    names = class_names(folder)
    single = pl.col("boxes") == 1
    table = images.select(
        split=pl.lit(split),
        id="ImageID",
        reason="reason",
        label=pl.when(single).then(pl.col("label").replace(names)),
        x0=pl.when(single).then("XMin"),
        y0=pl.when(single).then("YMin"),
        x1=pl.when(single).then("XMax"),
        y1=pl.when(single).then("YMax"),
        image=pl.format("{}/data/{}.jpg", pl.lit(split), "ImageID"),
        mask=pl.when(pl.col("masks") == 1).then(
            pl.format("{}/labels/masks/{}/{}", pl.lit(split), pl.col("ImageID").str.head(1).str.to_uppercase(), "mask")
        ),
        source="source",
    )
    return table, unreadable


def join_annotations(folder: Path) -> pl.DataFrame:
    """One row an image: its boxes and masks counted, and the first of each. The only pass over the CSVs, streamed.

    A mask belongs to a box by (ImageID, LabelName, corners). Where an image has one box and one mask, as every kept
    image has, (ImageID, LabelName) alone decides, so rounding of the corners cannot lose a pair.
    """
    boxes = scan(folder / "labels" / "detections.csv", DETECTION_COLUMNS)
    masks = scan(folder / "labels" / "segmentations.csv", SEGMENTATION_COLUMNS)
    flags = ("IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")
    boxes = boxes.group_by("ImageID").agg(
        pl.len().alias("boxes"),
        pl.col("damaged").sum().alias("damaged_boxes"),
        pl.col("LabelName").first().alias("label"),
        pl.col("XMin", "XMax", "YMin", "YMax").first(),
        pl.col(*flags).max(),
    )
    masks = masks.group_by("ImageID").agg(
        pl.len().alias("masks"),
        pl.col("damaged").sum().alias("damaged_masks"),
        pl.col("LabelName").first().alias("mask_label"),
        pl.col("MaskPath").first().alias("mask"),
    )
    counters = ("boxes", "masks", "damaged_boxes", "damaged_masks")
    images = boxes.join(masks, on="ImageID", how="full", coalesce=True, nulls_equal=True)
    if (path := metadata(folder, "image_ids.csv")) is not None:
        images = images.join(scan_ids(path), on="ImageID", how="full", coalesce=True, nulls_equal=True)
    if (path := metadata(folder, "sources.csv")) is not None:
        require_columns(path, ("ImageID", "Source"), "ImageID,Source,Repository,OriginalPath,Licence")
        sources = pl.scan_csv(path, infer_schema=False).select("ImageID", source="Source").unique("ImageID")
        images = images.join(sources, on="ImageID", how="left")
    else:
        images = images.with_columns(source=pl.lit(None, pl.String))
    return images.with_columns(pl.col(*counters).fill_null(0)).collect(engine="streaming")


def scan(path: Path, columns: dict[str, pl.DataType]) -> pl.LazyFrame:
    """The needed columns of an annotation CSV, lazily; ``damaged`` marks rows with a missing or unreadable value.

    A line that was cut short (an interrupted download) lacks its last fields and is marked so too.
    """
    require_columns(path, columns, FULL_HEADER[path.name])
    rows = pl.scan_csv(
        path,
        schema_overrides=dict(columns),
        infer_schema=False,
        truncate_ragged_lines=True,
        ignore_errors=True,
        quote_char=None,
        encoding="utf8-lossy",
    )
    return rows.select(*columns).with_columns(damaged=pl.any_horizontal(pl.col(*columns).is_null()))


def scan_ids(path: Path) -> pl.LazyFrame:
    """The first column of ``image_ids.csv``, whatever else the file holds."""
    ids = pl.scan_csv(path, infer_schema=False, truncate_ragged_lines=True)
    return ids.select(pl.first().alias("ImageID")).unique()


def require_columns(path: Path, columns: Sequence[str], header: str) -> None:
    """Raise UserError unless the CSV exists and its header names every column."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            found = file.readline().strip().split(",")
    except FileNotFoundError:
        raise UserError(f"{path}: file missing; an Open Images split needs it with the header {header}") from None
    if missing := [c for c in columns if c not in found]:
        raise UserError(f"{path}: column {', '.join(missing)} missing; the expected header is {header}")


def first_reason(rules: Rules, classes: set[str] | None, ids: set[str] | None) -> pl.Expr:
    """The first rule that an image breaks, or ``kept``. Flags of -1 mean "not known" and reject nothing."""
    boxes, masks = pl.col("boxes"), pl.col("masks")
    area = (pl.col("XMax") - pl.col("XMin")) * (pl.col("YMax") - pl.col("YMin"))
    never = pl.lit(False)
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
        "source not wanted": never if rules.sources is None else ~in_list(pl.col("source"), rules.sources),
        "id not listed": never if ids is None else ~pl.col("ImageID").is_in(list(ids)),
    }
    broken = [pl.when(condition).then(pl.lit(reason)) for reason, condition in conditions.items()]
    return pl.coalesce(*broken, pl.lit(KEPT))


def in_list(column: pl.Expr, wanted: Sequence[str]) -> pl.Expr:
    return column.is_in(list(wanted)).fill_null(False)


def limit_samples(images: pl.DataFrame, limit: int | None) -> pl.DataFrame:
    """Keep the first ``limit`` kept images in the order of their ids; Open Images ids are random, so this is a draw."""
    if limit is None:
        return images
    is_kept = pl.col("reason") == KEPT
    over = is_kept & (is_kept.cum_sum() > limit)
    return images.with_columns(reason=pl.when(over).then(pl.lit("over max_samples")).otherwise("reason"))


def check_files(table: pl.DataFrame, root: Path) -> pl.DataFrame:
    """Reject kept images whose image or mask file is not on the disk."""
    lost = {}
    kept = table.filter(pl.col("reason") == KEPT)
    for split, id_, image, mask in kept.select("split", "id", "image", "mask").iter_rows():
        if not os.path.isfile(root / image):
            lost[f"{split}/{id_}"] = "image file missing"
        elif not os.path.isfile(root / mask):
            lost[f"{split}/{id_}"] = "mask file missing"
    return reject(table, lost)


def reject(table: pl.DataFrame, reasons: dict[str, str]) -> pl.DataFrame:
    """The table with a new reason for each ``<split>/<id>`` in ``reasons``."""
    key = pl.concat_str("split", "id", separator="/")
    return table.with_columns(reason=key.replace_strict(reasons, default=pl.col("reason"), return_dtype=pl.String))


def metadata(folder: Path, name: str) -> Path | None:
    """``metadata/<name>`` of a split, or of the folder above it, or None."""
    return next((p for p in (folder / "metadata" / name, folder.parent / "metadata" / name) if p.is_file()), None)


def class_names(folder: Path) -> dict[str, str]:
    """Machine id to readable name, from ``classes.csv`` (no header); empty where the file is absent."""
    if (path := metadata(folder, "classes.csv")) is None:
        return {}
    with open(path, encoding="utf-8") as file:
        return dict(line.rstrip("\n").split(",", 1) for line in file if "," in line)


def class_ids(folder: Path, classes: Sequence[str] | None) -> set[str] | None:
    """Machine ids of classes given by name or by machine id. Raises UserError for a name the dataset does not have."""
    if classes is None:
        return None
    by_name = {name.lower(): mid for mid, name in class_names(folder).items()}
    known = set(by_name.values())
    if unknown := [c for c in classes if c.lower() not in by_name and c not in known]:
        raise UserError(
            f"dataset.select.classes: {folder} has no class {', '.join(unknown)}; "
            f"it has {', '.join(sorted(by_name)[:12])}, ... (metadata/classes.csv)"
        )
    return {by_name.get(c.lower(), c) for c in classes}


def listed_ids(rules: Rules) -> set[str] | None:
    """The ids of ``rules.image_ids``: a list, or the path of a text file with one id a line."""
    ids = rules.image_ids
    if isinstance(ids, str):
        try:
            ids = Path(ids).read_text().split()
        except OSError as error:
            raise UserError(f"dataset.select.image_ids: cannot read {ids}: {error.strerror}") from None
    return None if ids is None else {i.rsplit("/", 1)[-1] for i in ids}


def write_selection(selection: Selection, folder: Path, table: pl.DataFrame | None = None) -> tuple[Path, Path]:
    """Write ``selection.csv`` (every image with its reason) and ``selection.json`` (counts, skipped rows, rules).

    ``table`` replaces the selection's own once pixels have been looked at. Both files are replaced atomically.
    """
    table = selection.table if table is None else table
    folder.mkdir(parents=True, exist_ok=True)
    summary = {"counts": count_reasons(table), "skipped_rows": selection.skipped, "rules": asdict(selection.rules)}
    paths = folder / "selection.csv", folder / "selection.json"
    for path, text in zip(paths, (table.write_csv(), json.dumps(summary, indent=2, default=list) + "\n"), strict=True):
        partial = path.with_name(path.name + ".part")
        partial.write_text(text)
        os.replace(partial, path)
    return paths
