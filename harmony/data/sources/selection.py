"""The selection of a dataset's photographs: those that are kept, and the reason of each rejection."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import polars as pl

from harmony.core.errors import UserError
from harmony.core.files import write_text
from harmony.core.foreign import read_text
from harmony.core.row import SPLITS

KEPT, BAD_NAME, SAME_NAME = "kept", "no file name", "two images of one name"
BY_HAND = "by hand"
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
    # a person
    BY_HAND,
    # files
    BAD_NAME,
    SAME_NAME,
    "image file missing",
    "mask file missing",
    "foreground file missing",
    "foreground undecodable",
    "no place for the object",
    "composite file missing",
    "composite undecodable",
    "composite shape differs",
    # pixels, checked after the import
    "image undecodable",
    "mask undecodable",
    "mask empty",
    "mask shape differs",
    "mask area too small",
    "mask area too large",
)
ANNOTATION_REASONS = REASONS[:7]
RULE_REASONS = (*REASONS[7 : REASONS.index(BY_HAND)], "mask area too small", "mask area too large")
CORNERS = ("x0", "y0", "x1", "y1")  # of the box, in fractions of the image
COLUMNS = ("split", "id", "reason", "label", *CORNERS, "image", "mask", "source")
EXTRAS = ("composite", "exemplar")  # columns that only some layouts have: paths of further pictures of a row


def read_names(option: str, value: object) -> list[str] | None:
    """Read an option that lists names: one or several, also of digits alone; None for null. UserError otherwise."""
    if value is None:
        return None
    names = list(value) if isinstance(value, list | tuple) else [value]
    if wrong := [name for name in names if isinstance(name, bool) or not isinstance(name, str | int)]:
        raise UserError(f"dataset.{option}: {wrong[0]} is no name; put what looks like a number into quotes, ['1e5']")
    return [str(name) for name in names]


def read_splits(value: object) -> list[str]:
    """Read ``dataset.splits``, one or several, each once. UserError for one that does not exist."""
    splits = list(dict.fromkeys(read_names("splits", value) or ()))
    if not splits or set(splits) - set(SPLITS):
        raise UserError(f"dataset.splits={value}: choose among {', '.join(SPLITS)}")
    return splits


@dataclass(frozen=True)
class Rules:
    """A recipe's node ``select``. Areas are fractions of the image; a list that is None rejects nothing."""

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

    @classmethod
    def of(cls, options: dict) -> "Rules":
        """The rules of a recipe's node ``select``, in which one name may stand for a list of it."""
        names = {name: read_names(f"select.{name}", options.get(name)) for name in ("classes", "sources", "image_ids")}
        if isinstance(options.get("image_ids"), str):
            names["image_ids"] = options["image_ids"]  # a file
        return cls(**options | names)

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
    """A table of all images with the reason of each, and the number of damaged rows in each CSV (``damage_counts``).

    ``table`` has the columns ``COLUMNS`` and those of ``EXTRAS`` that the layout knows, one row for each image, paths
    relative to ``root``. ``x0, y0, x1, y1`` is the box in fractions of the image. Label, box and mask are null unless
    there is exactly one.
    """

    root: Path
    table: pl.DataFrame
    rules: Rules
    damage_counts: dict[str, int] = field(default_factory=dict)

    def counts(self) -> dict[str, dict[str, int]]:
        """Images per split and reason, ``kept`` first, then in the order of ``REASONS``."""
        return count_reasons(self.table)

    def digest(self) -> str:
        """A hash of rules and results, independent of the folder's place."""
        rules = json.dumps(asdict(self.rules), default=list, sort_keys=True)
        return hashlib.sha256(rules.encode() + self.table.write_csv().encode()).hexdigest()


class Source(NamedTuple):
    """A source of photographs with masks in one layout.

    ``select``: (recipe, work folder) -> its selection. ``captions``: (root of the selection, splits) -> captions by
    people, {<split>/<id>: [caption, ...]}. ``places``: (root of the selection, splits) -> all files and folders that it
    reads, also those that may come.
    """

    select: Callable[[dict, Path], Selection]
    captions: Callable[[Path, Sequence[str]], dict[str, list[str]]]
    places: Callable[[Path, Sequence[str]], list[Path]]


def area_reason(area: float, rules: Rules) -> str:
    """``kept``, or the reason for which a mask of that share of its image is not."""
    if rules.min_area <= area <= rules.max_area:
        return KEPT
    return "mask area too small" if area < rules.min_area else "mask area too large"


def reject_repeats(rows: Sequence[dict]) -> None:
    """Reject each row of a split that has the id of an earlier one; the names of its pictures go into its id."""
    keys = set()
    for row in rows:
        if (key := (row["split"], row["id"])) in keys and row["reason"] != BAD_NAME:
            pictures = " ".join(row[name] for name in ("composite", "image") if row.get(name))
            row |= {"id": f"{row['id']} ({pictures.replace('/', ' ')})", "reason": SAME_NAME}
        keys.add(key)


def count_reasons(table: pl.DataFrame) -> dict[str, dict[str, int]]:
    """``{split: {reason: images}}`` of a table with the columns ``split`` and ``reason``."""
    counts = {(split, reason): n for split, reason, n in table.group_by("split", "reason").len().iter_rows()}
    return {
        split: {r: counts[split, r] for r in (KEPT, *REASONS) if (split, r) in counts}
        for split in table["split"].unique(maintain_order=True)
    }


def format_counts(counts: dict[str, dict[str, int]]) -> str:
    """Format the counts as a small table: a row for each reason, a column for each split."""
    reasons = [r for r in (KEPT, *REASONS) if any(r in c for c in counts.values())]
    rows = [("", *counts)] + [(r, *(str(c.get(r, 0)) for c in counts.values())) for r in reasons]
    rows.append(("all", *(str(sum(c.values())) for c in counts.values())))
    return "\n".join(f"{first:<22}" + "".join(f"{cell:>12}" for cell in rest) for first, *rest in rows)


def check_files(table: pl.DataFrame, root: Path) -> pl.DataFrame:
    """Reject kept images whose image or mask file does not exist."""
    reasons = {}
    kept_rows = table.filter(pl.col("reason") == KEPT)
    for split, id_, image, mask in kept_rows.select("split", "id", "image", "mask").iter_rows():
        if not os.path.isfile(os.path.join(root, image)):
            reasons[f"{split}/{id_}"] = "image file missing"
        elif not os.path.isfile(os.path.join(root, mask)):
            reasons[f"{split}/{id_}"] = "mask file missing"
    return reject(table, reasons)


def reject(table: pl.DataFrame, reasons: dict[str, str]) -> pl.DataFrame:
    """Set a new reason for each ``<split>/<id>`` in ``reasons``."""
    key = pl.concat_str("split", "id", separator="/")
    return table.with_columns(reason=key.replace_strict(reasons, default=pl.col("reason"), return_dtype=pl.String))


def read_ids(rules: Rules) -> set[str] | None:
    """Read the ids of ``rules.image_ids``: a list, or the path of a text file with one id per line."""
    ids = rules.image_ids
    if isinstance(ids, str):
        ids = read_text(ids).split()
    return None if ids is None else {i.rsplit("/", 1)[-1] for i in ids}


def write_selection(selection: Selection, folder: Path, table: pl.DataFrame | None = None) -> tuple[Path, Path]:
    """Write ``selection.csv`` (every image with its reason) and ``selection.json`` (counts, skipped rows, rules).

    ``table`` replaces the selection's own table after the pixels have been checked. Both files are written atomically.
    """
    table = selection.table if table is None else table
    summary = {
        "counts": count_reasons(table),
        "skipped_rows": selection.damage_counts,
        "rules": asdict(selection.rules),
    }
    paths = folder / "selection.csv", folder / "selection.json"
    for path, text in zip(paths, (table.write_csv(), json.dumps(summary, indent=2, default=list) + "\n"), strict=True):
        write_text(path, text)
    return paths


def limit_samples(table: pl.DataFrame, limit: int | None) -> pl.DataFrame:
    """Keep the first ``limit`` rows of each split, a random draw where ids are random, as those of Open Images are."""
    if limit is None:
        return table
    is_kept = pl.col("reason") == KEPT
    exceeds = is_kept & (is_kept.cum_sum().over("split") > limit)
    return table.with_columns(reason=pl.when(exceeds).then(pl.lit("over max_samples")).otherwise("reason"))
