"""Open Images V7 layout: the files of a split, and readers of its tables.

    data/<ImageID>.jpg                                  the photographs, also as .png or another picture file
    labels/detections.csv, labels/segmentations.csv     boxes and masks, boxes in fractions of the image
    labels/masks/<HEX>/<MaskPath>                       mask files, HEX = first digit of the image's id, upper case
    metadata/classes.csv                                MID and name, without header
    metadata/{image_ids,sources}.csv                    optional: all images, and the source of each
    metadata/human_captions.json                        optional: {id: [caption, ...]}

Metadata may also be in the folder above, for all splits; captions may not. ``select.py`` selects the photographs with a
single instance, ``pixels.py`` the largest instance of each photograph.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl

from harmony.core.errors import UserError
from harmony.core.foreign import NAME_BYTES, NO_FILE_NAME, read_csv
from harmony.data.sources.files import SPLIT_NAMES, read_caption_file, split_folder, tell_omissions
from harmony.pixels.images import SUFFIXES

FULL_HEADER = {
    "detections.csv": "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside",
    "segmentations.csv": "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks",
}
IMAGE, MASK = "data/{}.jpg", "labels/masks/{}/{}"
CORNERS = ("XMin", "XMax", "YMin", "YMax")
FLAGS = ("IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")  # 0, 1, or -1 for "unknown"
BOX_COLUMNS = (
    dict.fromkeys(("ImageID", "LabelName"), pl.String)
    | dict.fromkeys(CORNERS, pl.Float32)
    | dict.fromkeys(FLAGS, pl.Int8)
)


@dataclass(frozen=True)
class Split:
    """The files of one split in ``folder``, whose name is that of the split or another that tools give it."""

    folder: Path

    @property
    def name(self) -> str:
        return SPLIT_NAMES.get(self.folder.name, self.folder.name)

    @property
    def box_file(self) -> Path:
        return self.folder / "labels" / "detections.csv"

    @cached_property
    def other_photographs(self) -> dict[str, str]:
        """Map ids of photographs that are no ``<id>.jpg`` to their files; further files of one id are named."""
        folder = self.folder / "data"
        files = set(os.listdir(folder)) if folder.is_dir() else set()
        files_but_jpg = sorted(name for name in files if not name.endswith(".jpg"))
        others = [name for name in files_but_jpg if Path(name).suffix.lower() in SUFFIXES]
        photographs = {Path(name).stem: name for name in others if f"{Path(name).stem}.jpg" not in files}
        tell_omissions(f"{folder}: further files of one id", sorted({*others} - {*photographs.values()}))
        return photographs

    def image(self, id_: str) -> Path:
        """The file of a photograph."""
        return self.folder / "data" / self.other_photographs.get(id_, f"{id_}.jpg")

    def image_path(self) -> pl.Expr:
        """The path of the photograph of a row's ``ImageID``, relative to the folder above the split."""
        usual, others = pl.format(IMAGE, "ImageID"), {id_: f"data/{n}" for id_, n in self.other_photographs.items()}
        path = pl.col("ImageID").replace_strict(others, default=usual, return_dtype=pl.String) if others else usual
        return pl.format("{}/{}", pl.lit(self.folder.name), path).alias("image")

    def boxes(self) -> pl.LazyFrame:
        """``BOX_COLUMNS`` and ``damaged`` of each box."""
        return scan(self.box_file, BOX_COLUMNS)

    def masks(self, number: type[pl.DataType] = pl.Float32) -> pl.LazyFrame:
        """MaskPath, ImageID, LabelName, the corners of the box as ``number`` and ``damaged`` of each mask."""
        columns = dict.fromkeys(("MaskPath", "ImageID", "LabelName"), pl.String)
        columns |= dict.fromkeys((f"Box{corner}" for corner in CORNERS), number)
        return scan(self.folder / "labels" / "segmentations.csv", columns)

    def image_ids(self) -> pl.LazyFrame | None:
        """ImageID of every image, annotated or not: the first column of ``image_ids.csv``."""
        if (path := self.metadata("image_ids.csv")) is None:
            return None
        return scan_csv(path).select(pl.first().alias("ImageID")).unique()

    def sources(self) -> pl.LazyFrame | None:
        """ImageID and ``source`` of every image; None if the dataset has no sources."""
        if (path := self.metadata("sources.csv")) is None:
            return None
        require_columns(path, ("ImageID", "Source"), "ImageID,Source,Repository,OriginalPath,Licence")
        return scan_csv(path).select("ImageID", source="Source").unique("ImageID")

    def class_names(self) -> dict[str, str]:
        """Machine id to readable name, on one line; empty if there is no ``classes.csv``."""
        if (path := self.metadata("classes.csv")) is None:
            return {}
        return {mid: " ".join(",".join(names).split()) for mid, *names in read_csv(path) if names}

    def captions(self) -> dict[str, list[str]]:
        """Captions by people, {id: [caption, ...]}; empty if there are none.

        For the studio set the second caption describes the same object under the other light.
        """
        return read_caption_file(self.folder / "metadata" / "human_captions.json")

    def metadata(self, name: str) -> Path | None:
        """``metadata/<name>`` of the split, or of the folder above it, or None."""
        places = (self.folder / "metadata" / name, self.folder.parent / "metadata" / name)
        return next((path for path in places if path.is_file()), None)


def find_splits(root: Path, names: Sequence[str]) -> list[Split]:
    """Find the folders of the splits. UserError if one is missing."""
    folders = [split_folder(root, name) for name in names]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such split; set dataset.dir to a folder that holds {', '.join(names)}")
    return [Split(folder) for folder in folders]


def has_bad_name() -> pl.Expr:
    """Whether a row's ``ImageID`` or ``MaskPath`` cannot name a file."""
    names = (pl.col("ImageID"), pl.col("MaskPath").fill_null("none"))
    return pl.any_horizontal(n.str.contains(NO_FILE_NAME) | (n.str.len_bytes() > NAME_BYTES) for n in names)


def mask_path() -> pl.Expr:
    """The path of the mask file of a row's ``ImageID`` and ``MaskPath`` in its split."""
    return pl.format(MASK, pl.col("ImageID").str.head(1).str.to_uppercase(), "MaskPath").alias("mask")


def scan(path: Path, columns: dict[str, type[pl.DataType]]) -> pl.LazyFrame:
    """Scan the required columns of an annotation CSV; ``damaged`` marks rows with a missing or unreadable value.

    An incomplete line (of an interrupted download) lacks its last fields and is marked too.
    """
    require_columns(path, columns, FULL_HEADER[path.name])
    rows = scan_csv(path, columns)
    return rows.select(*columns).with_columns(damaged=is_damaged(columns))


def is_damaged(columns: Iterable[str]) -> pl.Expr:
    """Whether a row lacks the value of a column, or has one that cannot be read."""
    return pl.any_horizontal(pl.col(*columns).is_null())


def scan_csv(path: Path, types: Mapping[str, type[pl.DataType]] | None = None) -> pl.LazyFrame:
    """Scan a CSV by any program, columns as text or of ``types``, unreadable values as null. UserError if it is empty.

    Quotes are removed from each field where the header has them; no field that is read holds a comma. So neither a
    stray quote nor a line that is cut within quotes swallows the lines behind it.
    """
    with open(path, "rb") as file:
        header = file.readline()
    if not header.strip(b"\xef\xbb\xbf\r\n "):
        raise UserError(f"{path}: its first line is empty; give it a header, or remove the file")
    is_quoted = b'"' in header
    table = parse_csv(path, None if is_quoted else types)
    if not is_quoted:
        return table
    names = [name.strip('"') for name in table.collect_schema().names()]
    if len({*names}) < len(names):
        raise UserError(f"{path}: two columns of its first line have one name; give each its own")
    table = table.rename(lambda name: name.strip('"')).with_columns(pl.all().str.strip_chars('"'))
    return table.cast(dict(types or {}), strict=False)


def parse_csv(source: Path | bytes, types: Mapping[str, type[pl.DataType]] | None = None) -> pl.LazyFrame:
    """Scan a CSV with quotes as plain letters, columns as text or of ``types``, unreadable values as null."""
    return pl.scan_csv(
        source,
        schema_overrides=types,
        infer_schema=False,
        truncate_ragged_lines=True,
        ignore_errors=True,
        quote_char=None,
        encoding="utf8-lossy",
    )


def require_columns(path: Path, columns: Sequence[str], header: str) -> None:
    """Raise UserError unless the CSV exists and its header names every column."""
    if not path.is_file():
        raise UserError(f"{path}: file missing; an Open Images split needs it with the header {header}")
    names = scan_csv(path).collect_schema().names()
    if missing_columns := [c for c in columns if c not in names]:
        raise UserError(f"{path}: column {', '.join(missing_columns)} missing; the expected header is {header}")
