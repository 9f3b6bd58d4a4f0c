"""The page of a run: pictures by row with a slider between two of them, figures and configuration, in one file."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from harmony.core.files import PACKAGE, write_text
from harmony.evaluation.eval_sets import subsample
from harmony.pixels.images import limit_size, read_image, resize

TEMPLATE = PACKAGE / "assets" / "report.html"
NAME = "report.html"
ROWS = 24  # rows on a page, at most
STEPS = 8  # of a training, of which it shows the grids
SIDE = 1024  # px: longer side of a picture on it; larger ones are shrunk
SMALL = 128  # px: up to this side a picture keeps every pixel value
LIMIT = 9_500_000  # characters of all pictures: browsers of phones still take it


class PageRow(NamedTuple):
    """A row of a page: its title, its pictures (title -> uint8 H x W x 3, the truth last), the id of what they show."""

    title: str
    pictures: Mapping[str, np.ndarray]
    id: str


def by_row(ids: Sequence[str], captions: Sequence[str], columns: Mapping[str, Sequence[np.ndarray]]) -> list[PageRow]:
    """The rows of a page from ``columns``, title -> a picture for each id, which its caption goes with."""
    return [
        PageRow(f"{key}: {caption}" if caption else key, {title: column[n] for title, column in columns.items()}, key)
        for n, (key, caption) in enumerate(zip(ids, captions, strict=True))
    ]


def read_grids(folder: Path) -> list[PageRow]:
    """The rows of a training that measures itself: its grids, NAME_STEP.png of ``folder``, some steps of each name."""
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*_*.png")):
        files.setdefault(file.stem.rpartition("_")[0], []).append(file)
    rows = []
    for name, steps in files.items():
        few = subsample(steps, STEPS)
        rows.append(PageRow(name, {f"step {file.stem.rpartition('_')[2]}": read_image(file) for file in few}, name))
    return rows


def write_page(folder: Path, title: str, text: str, config: str, rows: Iterable[PageRow], count: int) -> Path:
    """Write ``report.html`` and return its path.

    ``text``: tables and notes in Markdown; ``rows``: some of ``count`` pictures, left out where the page would grow
    too large. The page needs no network; every name on it is text, whatever it holds.
    """
    content = {"title": title, "blocks": split_text(text), "config": config, "rows": encode_rows(rows), "count": count}
    write_text(folder / NAME, fill_template(TEMPLATE, "REPORT_AS_JSON", content))
    return folder / NAME


def fill_template(template: Path, mark: str, content: object) -> str:
    """The page ``template`` with ``content`` as JSON in the place of ``mark``; it cannot end the script element."""
    text = json.dumps(content).replace("<", "\\u003c")
    return template.read_text(encoding="utf-8").replace(mark, text)


def split_text(text: str) -> list[str | list[list[str]]]:
    """The tables of a Markdown text as rows of cells, the head first, and its other lines as they are."""
    blocks: list[str | list[list[str]]] = []
    for is_table, lines in groupby(text.splitlines(), lambda line: line.startswith("|")):
        if is_table:
            blocks.append([split_cells(line) for line in lines if not line.startswith("|--")])
        else:
            blocks += filter(None, lines)
    return blocks


def split_cells(line: str) -> list[str]:
    """The cells of one line of a Markdown table."""
    return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]


def encode_rows(rows: Iterable[PageRow]) -> list[dict]:
    """The rows for the page, the largest left out until all together are below LIMIT."""
    encoded = [
        {"name": row.title, "pictures": [{"title": title, "source": data_uri(y)} for title, y in row.pictures.items()]}
        for row in rows
    ]
    sizes = [sum(len(picture["source"]) for picture in row["pictures"]) for row in encoded]
    while len(encoded) > 1 and sum(sizes) > LIMIT:
        largest = sizes.index(max(sizes))
        del sizes[largest], encoded[largest]
    return encoded


def shrink(picture: np.ndarray) -> np.ndarray:
    """A picture at the size at which a page shows it."""
    height, width = picture.shape[:2]
    return resize(picture, *limit_size(width, height, SIDE))


def data_uri(picture: np.ndarray) -> str:
    """A picture for a page without a network: a small one exactly, any other shrunk and as JPEG."""
    height, width = picture.shape[:2]
    picture = shrink(picture)
    kind, options = ("webp", {"lossless": True}) if max(height, width) <= SMALL else ("jpeg", {"subsampling": 0})
    file = BytesIO()
    Image.fromarray(picture).save(file, kind, quality=90, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
