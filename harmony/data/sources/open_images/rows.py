"""The kept samples of a FiftyOne dataset as rows of a manifest."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from harmony.core.files import write_text
from harmony.core.row import Row
from harmony.data.sources.files import split_folder
from harmony.data.sources.selection import EXTRAS, KEPT, Selection
from harmony.data.sources.studio.files import TRUTHS
from harmony.pixels.images import sha256

if TYPE_CHECKING:
    from harmony.data.sources.open_images.database import Dataset


def export_rows(dataset: "Dataset", base: Path, captions: dict[str, list[str]], selection: Selection) -> list[Row]:
    """The kept samples as rows, paths relative to ``base``; ``captions`` by people as {<split>/<id>: [caption, ...]}.

    ``extras`` holds what a study needs beyond the row: the truths of renders, and the columns ``EXTRAS`` of the
    selection.
    """
    extras = selection_extras(selection, base)
    fields = ("harmony_id", "filepath", "mask_file", "mask_box", "instance.label", "caption", "caption_model")
    fields += ("metadata.width", "metadata.height", "sha256", "mask_sha256")
    root = Path(dataset.info["root"])
    return [
        Row(
            id=key.split("/", 1)[1],
            image=os.path.relpath(image, base),
            mask=os.path.relpath(mask, base),
            box=tuple(box),
            label=label,
            caption=caption,
            split=key.split("/", 1)[0],
            width=width,
            height=height,
            sha256=digest,
            extras={
                "caption_source": model,
                "mask_sha256": mask_digest,
                **studio_extras(root, key, base, captions),
                **extras.get(key, {}),
            },
        )
        for key, image, mask, box, label, caption, model, width, height, digest, mask_digest in zip(
            *dataset.match_tags("kept").values(list(fields)), strict=True
        )
    ]


def write_index(folder: Path, rows: Sequence[Row]) -> None:
    """Write ``index.csv``, by which ``harmonize dir=`` reads the composites of ``rows``, if there are some.

    The background of an object from another picture stands beside its composite. An id that occurs in several splits
    has its split before it.
    """
    composites = [row for row in rows if "composite" in row.extras]
    if not composites:
        return
    counts = Counter(row.id for row in composites)
    ids = [row.id if counts[row.id] == 1 else f"{row.split}_{row.id}" for row in composites]
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", "composite", "mask", "background"])
    for id_, row in zip(ids, composites, strict=True):
        table.writerow([id_, row.extras["composite"], row.mask, "" if row.has_truth else row.image])
    write_text(folder / "index.csv", text.getvalue())


def selection_extras(selection: Selection, base: Path) -> dict[str, dict[str, str]]:
    """Paths, relative to ``base``, and hashes of the further pictures of kept rows, {<split>/<id>: {name: value}}."""
    extras: dict[str, dict[str, str]] = {}
    kept_rows = selection.table.filter(pl.col("reason") == KEPT)
    for name in set(EXTRAS) & set(kept_rows.columns):
        for split, id_, file in kept_rows.select("split", "id", name).drop_nulls().iter_rows():
            path = selection.root / file
            values = {name: os.path.relpath(path, base), f"{name}_sha256": sha256(path)}
            extras.setdefault(f"{split}/{id_}", {}).update(values)
    return extras


def studio_extras(root: Path, key: str, base: Path, captions: dict[str, list[str]]) -> dict[str, str]:
    """Paths of the ground truth that only renders have, and the caption of the object under the other light."""
    split, id_ = key.split("/", 1)
    files = {name: split_folder(root, split) / pattern.format(id_) for name, pattern in TRUTHS.items()}
    extras = {"relit_sha256": sha256(files["relit"])} if files["relit"].is_file() else {}
    extras |= {name: os.path.relpath(path, base) for name, path in files.items() if path.is_file()}
    if "relit" in extras and len(captions.get(key, ())) > 1:
        extras["relit_caption"] = captions[key][1]
    return extras
