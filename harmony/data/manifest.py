"""``manifest.jsonl``: a header line, then one ``Row`` per line. All that training knows of a dataset.

Paths are relative to the manifest's folder. Rows are ordered by (split, id) and are the same in every run of the same
preparation, so that equal data have an equal ``manifest_hash``.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from harmony.core.errors import UserError
from harmony.core.files import replace_file
from harmony.core.foreign import is_file_name, parse_json, read_lines
from harmony.core.row import SCHEMA_VERSION, SPLITS, Row

FIELDS = {f.name for f in fields(Row)}


def write_manifest(path: Path, rows: Iterable[Row], dataset: str, **facts: object) -> dict:
    """Write header and rows atomically; ``facts`` are added to the header. Returns the header."""
    rows = sorted(rows, key=lambda row: (SPLITS.index(row.split), row.id))
    header = {"schema": SCHEMA_VERSION, "dataset": dataset, "rows": len(rows), **facts}
    with replace_file(path) as temp_path, open(temp_path, "w", encoding="utf-8") as file:
        file.write(json.dumps(header, ensure_ascii=False) + "\n")
        file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    return header


def read_manifest(path: str | Path, split: str | None = None) -> tuple[dict, list[Row]]:
    """Read (header, rows), the rows of one split or of all. Raises UserError that names the wrong line."""
    path = Path(path)
    remedy = "run harmony.prepare again"
    if not path.exists():
        raise UserError(f"{path}: no manifest; run harmony.prepare for this dataset first")
    lines = read_lines(path)
    if lines == [""]:
        raise UserError(f"{path}: empty manifest; {remedy}")
    header = parse_object(path, 1, lines[0])
    if header.get("schema") != SCHEMA_VERSION:
        raise UserError(f"{path}: line 1: schema {header.get('schema')}, this version reads {SCHEMA_VERSION}; {remedy}")
    rows = [parse_row(path, number, line) for number, line in enumerate(lines[1:], start=2)]
    if len(rows) != header.get("rows"):
        raise UserError(f"{path}: {len(rows)} rows where the header promises {header.get('rows')}; {remedy}")
    keys: set[tuple[str, str]] = set()
    for number, row in enumerate(rows, start=2):
        if (row.split, row.id) in keys:
            raise UserError(f"{path}: line {number}: {row.split}/{row.id} stands there twice; {remedy}")
        keys.add((row.split, row.id))
    if split is not None and split not in SPLITS:
        raise UserError(f"split {split!r} does not exist; choose one of {', '.join(SPLITS)}")
    return header, [row for row in rows if split is None or row.split == split]


def read_split(path: str | Path, split: str) -> list[Row]:
    """Read the rows of one split. UserError, which says how to fill it, if there are none."""
    rows = read_manifest(path)[1]
    rows_of = {name: [row for row in rows if row.split == name] for name in SPLITS}
    if not rows_of[split]:
        counts = ", ".join(f"{name} {len(part)}" for name, part in rows_of.items())
        raise UserError(
            f"{path} has no rows in split {split} ({counts}): prepare three photographs or more, put some into "
            f"{split}/ yourself, or loosen dataset.select and dataset.splits"
        )
    return rows_of[split]


def parse_row(path: Path, number: int, line: str) -> Row:
    """Parse and check one line. Raises UserError."""
    values = parse_object(path, number, line)
    if missing_fields := sorted(FIELDS - {"extras"} - set(values)):
        raise UserError(f"{path}: line {number}: field {', '.join(missing_fields)} missing; run harmony.prepare again")
    if extra_fields := sorted(set(values) - FIELDS):
        raise UserError(f"{path}: line {number}: unknown field {', '.join(extra_fields)}; run harmony.prepare again")
    if problem := row_problem(values):
        raise UserError(f"{path}: line {number}: {problem}; run harmony.prepare again")
    return Row(**values | {"box": tuple(values["box"])})


def row_problem(values: dict) -> str | None:
    """What is wrong with a row's values, or None."""
    texts = ("id", "image", "mask", "label", "caption", "split", "sha256")
    if names := [name for name in texts if not isinstance(values[name], str)]:
        return f"{', '.join(names)} must be text"
    extras = values.get("extras", {})
    if not isinstance(extras, dict) or not all(isinstance(value, str) for value in extras.values()):
        return f"extras {extras!r} must be texts by name"
    if not is_file_name(values["id"]):
        return f"id {values['id']!r} cannot name a file"
    if values["split"] not in SPLITS:
        return f"split {values['split']!r} is none of {', '.join(SPLITS)}"
    width, height, box = values["width"], values["height"], values["box"]
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
        return f"size {width} x {height} must be positive whole numbers"
    is_box = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
    if not is_box or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        return f"box {box} must be (x0, y0, x1, y1) in pixels within {width} x {height}"
    return None


def parse_object(path: Path, number: int, line: str) -> dict:
    """Parse one line as a JSON object. Raises UserError."""
    try:
        value = parse_json(line)
    except ValueError as error:
        raise UserError(f"{path}: line {number}: not JSON ({error}); run harmony.prepare again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: line {number}: expected an object; run harmony.prepare again")
    return value


def manifest_hash(path: str | Path) -> str:
    """sha256 of the rows, without the header: the identity of a prepared dataset. Raises UserError if there is none."""
    try:
        with open(path, "rb") as file:
            file.readline()
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path}: no manifest; run harmony.prepare for this dataset first") from None


def share_out(render: np.ndarray, photos: float) -> np.ndarray:
    """The share of each of N items in what is trained on, sum 1: ``photos`` for all photographs together.

    ``render``: whether an item shows a render, bool N. Where there is one kind alone, all items have the same share.
    """
    counts = (~render).sum(), render.sum()
    if not all(counts):
        return np.full(len(render), 1 / len(render))
    return np.where(render, (1 - photos) / counts[1], photos / counts[0])


def is_render(row: Row) -> bool:
    """Whether the row shows a studio scene; everything else is a photograph."""
    return row.extras.get("source") == "studio"
