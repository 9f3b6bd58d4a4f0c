"""Download of Open Images V7 into FiftyOne's zoo folder: annotations, then the selected images and masks."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from harmony.core.errors import UserError
from harmony.core.files import write_text
from harmony.data.sources.open_images.database import load_fiftyone, open_images_downloader
from harmony.data.sources.open_images.select import select
from harmony.data.sources.selection import BAD_NAME, KEPT, Rules, Selection, check_files

ZOO_FOLDER = "open-images-v7"


def download(splits: Iterable[str], rules: Rules, work: Path, examples: int) -> Selection:
    """Download ``splits`` and select from them.

    ``examples`` rejected images per split and reason are downloaded too, so that each reason can be inspected. Masks
    are published as 16 archives a split, by the first digit of the id. Raises UserError without a network.
    """
    root = Path(load_fiftyone().config.dataset_zoo_dir) / ZOO_FOLDER
    for split in splits:
        fetch(root, split, [], work)
    selection = select(root, list(splits), rules, files=False)
    for split in splits:
        table = selection.table.filter(pl.col("split") == split)
        rejected_rows = (
            table.filter(~pl.col("reason").is_in([KEPT, BAD_NAME]))
            .group_by("reason", maintain_order=True)
            .head(examples)
        )
        fetch(root, split, [*table.filter(pl.col("reason") == KEPT)["id"], *rejected_rows["id"]], work)
    return Selection(root, check_files(selection.table, root), rules, selection.damage_counts)


def fetch(root: Path, split: str, ids: list[str], work: Path) -> None:
    """Download annotations, images and mask archives of ``ids`` by FiftyOne, except for existing files."""
    id_file = write_id_file(work / f"{split}_ids.txt", split, ids)
    forget_interrupted(root / split)
    what = f"images and masks of {len(ids)} photographs" if ids else "annotations"
    print(f"Open Images {split}: {what} into {root / split}", flush=True)
    try:
        open_images_downloader()(
            str(root / split), split, "v7", label_types=["detections", "segmentations"], image_ids=str(id_file)
        )
    except Exception as error:  # any error of the network, the disk or the libraries
        raise UserError(
            f"Open Images {split}: download failed ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
            "check the network and run the same command again, or set dataset.dir to a folder that holds the dataset"
        ) from error
    (root / split / ".fetching").unlink(missing_ok=True)


def write_id_file(path: Path, split: str, ids: Iterable[str]) -> Path:
    """Write one ``<split>/<id>`` per line, FiftyOne's format of image ids."""
    write_text(path, "".join(f"{split}/{id_}\n" for id_ in ids))
    return path


def forget_interrupted(folder: Path) -> None:
    """Delete files that an interrupted download may have left incomplete, and start the record of the next download.

    FiftyOne writes CSVs and archives in place and treats every file as complete. ``.fetching`` lists the files from
    before the download. Images are kept: each is renamed into place when it is complete.
    """
    record = folder / ".fetching"
    if record.is_file():
        names = set(json.loads(record.read_text()))
        for path in download_parts(folder):
            if str(path.relative_to(folder)) not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_text(record, json.dumps([str(p.relative_to(folder)) for p in download_parts(folder)]))


def download_parts(folder: Path) -> list[Path]:
    """The units of a download: each CSV, each mask archive and each folder of an unpacked archive."""
    places = (folder / "metadata", folder / "labels", folder / "labels" / "masks")
    return [p for place in places for p in place.glob("*") if p != places[-1]]
