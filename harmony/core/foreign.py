"""Readers of the text, JSON and CSV files that people bring, and the one way from a name in them to a path.

Spreadsheets and editors write a byte order mark, CRLF and quotes; captions from the web hold every character that
Unicode has. What these functions return can always be written again as UTF-8.
"""

import csv
import json
import math
import os
import re
from io import StringIO
from pathlib import Path
from typing import Any

from harmony.core.errors import UserError

NO_FILE_NAME = r"^\.{0,2}$|[/\x00]"  # a regular expression of Python and of polars
NAME_BYTES = 200  # the system allows 255, of which suffixes and temporary files take some


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file, with or without a byte order mark. UserError if that fails."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device would be waited for without end
            raise UserError(f"{path} cannot be read: it is no file")
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} cannot be read: it does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start}"
        raise UserError(f"{path} cannot be read as text ({place}); save it as UTF-8") from None


def replace_surrogates(text: str) -> str:
    """Replace each half of a surrogate pair that stands alone, which UTF-8 cannot write, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parse_json(text: str) -> Any:
    """Parse JSON, without lone surrogates in its texts. ValueError for anything else, however deep."""
    try:
        value = json.loads(text)
        return json.loads(replace_surrogates(json.dumps(value, ensure_ascii=False))) if "\\u" in text else value
    except RecursionError:
        raise ValueError("too deep") from None


def read_json(path: str | Path) -> Any:
    """Read a JSON file. UserError if it is missing or is none."""
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); mend it or remove it") from None


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of a file, which end at a line feed alone: U+2028 and U+0085 may stand in a text."""
    return read_text(path).removesuffix("\n").split("\n")


def read_csv(path: str | Path, delimiter: str = ",") -> list[list[str]]:
    """Read the rows of a CSV file; fields may be quoted, empty lines are left out. UserError if that fails."""
    try:
        return [row for row in csv.reader(StringIO(read_text(path)), delimiter=delimiter) if any(row)]
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as CSV ({error}); save it again as CSV, UTF-8") from None


def read_table(path: str | Path) -> list[dict[str, str]]:
    """Read a CSV file with a header as {column: value} for each row; a cut row lacks its last columns."""
    header, *rows = read_csv(path) or [[]]
    return [dict(zip(map(str.strip, header), row, strict=False)) for row in rows]


def parse_box(text: str) -> list[float] | None:
    """Parse ``x0 y0 x1 y1``, with commas and brackets as other programs write lists; None for anything else."""
    try:
        box = [float(word) for word in re.sub(r"[\[\](),;]", " ", text).split()]
    except ValueError:
        return None
    return box if len(box) == 4 and all(map(math.isfinite, box)) else None


# --- names


def is_file_name(name: str) -> bool:
    """Whether a foreign name can name a file: no path, not longer than a file name, and UTF-8 can write it."""
    try:
        return not re.search(NO_FILE_NAME, name) and len(name.encode()) <= NAME_BYTES
    except UnicodeEncodeError:
        return False


def path_inside(folder: Path, *names: str) -> Path:
    """The path of a file that foreign ``names`` call ``folder/name/...``. UserError where it would lie elsewhere."""
    relative = os.path.normpath(os.path.join(".", *names))
    if os.path.isabs(relative) or "\0" in relative or relative.split(os.sep)[0] in ("..", "."):
        raise UserError(f"{'/'.join(names)!r} leads out of {folder}; give it a name without a path")
    return folder / relative
