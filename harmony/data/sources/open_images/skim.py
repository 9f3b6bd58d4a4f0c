"""The boxes of images from a large table, of which only lines are parsed that are alone on their image.

Whether an image has exactly one box is told by the ids, and in Open Images' files the lines of an image stand together.
So the table is read in blocks of bytes, and the ids of adjacent lines are compared as numbers of eight bytes.
"""

from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from harmony.data.sources.open_images.layout import BOX_COLUMNS, is_damaged, parse_csv

BLOCK = 2**18  # bytes read at a time: it fits the cache, and its memory is used again; larger ones cost twice as much
COMMA, LINE_FEED = b",\n"
ID_BYTES = range(8, 17)  # lengths of an id that two numbers of eight bytes cover


class Runs(NamedTuple):
    """Runs of adjacent lines with one id: the ids as lines, the length of each, and the lines that are alone.

    ``size``: the bytes that they take in the table.
    """

    ids: bytes
    lengths: np.ndarray
    single_lines: bytes
    size: int


def skim_boxes(path: Path) -> pl.DataFrame | None:
    """Read the number of boxes of each image, and the box where it is one; None for a table that is not plain.

    Columns ImageID, ``boxes``, ``damaged_boxes``, and of single boxes those of ``BOX_COLUMNS``. A plain table begins
    with the column ImageID, has no quotes in its header, all fields in every line and the lines of an image together.
    A value that is no number is damage only in a line that is parsed: that of a single box.
    """
    if (runs := read_runs(path)) is None:
        return None
    ids = parse_csv(runs.ids).collect()["ImageID"]
    if ids.n_unique() < len(ids):
        return None
    images = pl.DataFrame({"ImageID": ids, "boxes": pl.Series(runs.lengths, dtype=pl.UInt32)})
    several = images.filter(pl.col("boxes") > 1).with_columns(damaged_boxes=pl.lit(0, pl.UInt32))
    counts = {"boxes": pl.lit(1, pl.UInt32), "damaged_boxes": is_damaged(BOX_COLUMNS).cast(pl.UInt32)}
    single = parse_csv(runs.single_lines, BOX_COLUMNS).select(*BOX_COLUMNS, **counts).collect()
    return pl.concat([single, several], how="diagonal")


def read_runs(path: Path) -> Runs | None:
    """Read the runs of a table, ids and single lines under a header; None if a part of it is not plain."""
    lengths, ids, lines, rest = [np.empty(0, int)], BytesIO(), BytesIO(), b""
    with open(path, "rb") as file:
        header = file.readline()
        if not header.startswith(b"ImageID,") or b'"' in header:
            return None
        ids.write(b"ImageID\n")
        lines.write(header)
        while data := rest + (new := file.read(BLOCK)):
            runs = find_runs(data, header.count(b","), is_last=len(new) < BLOCK)
            if runs is None:
                return None
            lengths.append(runs.lengths)
            ids.write(runs.ids)
            lines.write(runs.single_lines)
            rest = data[runs.size :]
        return Runs(ids.getvalue(), np.concatenate(lengths), lines.getvalue(), file.tell())


def find_runs(data: bytes, commas: int, is_last: bool) -> Runs | None:
    """Find the runs in a block of lines with so many commas; None if it is not plain.

    Its last run may go on in the next block, and is left to that unless the block ``is_last``.
    """
    data += b"\n" * (is_last and not data.endswith(b"\n"))
    array = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(array == LINE_FEED) + 1
    starts, width = np.append(0, ends[:-1]), data.find(b",")
    is_short = not len(ends) or width not in ID_BYTES or (ends - starts).min() <= width
    if is_short or (array[starts + width] != COMMA).any() or b"\r" in data:
        return None
    firsts = find_changes(data, starts, width)
    bounds = np.append(firsts, len(starts)) if is_last else firsts
    firsts, lengths, size = bounds[:-1], np.diff(bounds), int(ends[bounds[-1] - 1])
    if not len(firsts) or not has_all_fields(array[:size], commas * bounds[-1]):
        return None
    ids = np.lib.stride_tricks.sliding_window_view(array, width + 1)[starts[firsts]]
    ids[:, -1] = LINE_FEED
    letters = ids[:, :-1]
    if ((letters <= ord(" ")) | (letters > ord("~")) | (letters == COMMA)).any():
        return None
    single = firsts[lengths == 1]
    lines = [data[start:end] for start, end in zip(starts[single].tolist(), ends[single].tolist(), strict=True)]
    return Runs(ids.tobytes(), lengths, b"".join(lines), size)


def find_changes(data: bytes, starts: np.ndarray, width: int) -> np.ndarray:
    """Find the lines whose first ``width`` bytes, 8 to 16, differ from those of the line before; the first is one."""
    numbers = np.ndarray(len(data) - 7, np.uint64, data, strides=(1,))  # the number at each byte
    low, high = numbers[starts], numbers[starts + width - 8]
    return np.flatnonzero(np.append(True, (low[1:] != low[:-1]) | (high[1:] != high[:-1])))


def has_all_fields(lines: np.ndarray, commas: int) -> bool:
    """Whether lines of text have so many commas together, and no empty field."""
    is_comma = lines == COMMA
    is_separator = is_comma | (lines == LINE_FEED)
    return np.count_nonzero(is_comma) == commas and not (is_separator[1:] & is_separator[:-1]).any()
