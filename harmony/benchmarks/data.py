"""Selection over annotations of Open Images' true schema and size, against what a script with pandas does; and the
import of what was selected into FiftyOne, against FiftyOne's own importer.

The annotations are generated: 21 columns a box as in the training split, several boxes on most images, masks for some.
The photographs to import have one box and one mask each, masks of 1024 x 768 px in files of their own.
"""

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

from harmony.benchmarks.measure import Rates, peak_memory
from harmony.data.sources.open_images.database import import_dataset, load_fiftyone
from harmony.data.sources.open_images.layout import FULL_HEADER, Split
from harmony.data.sources.open_images.select import select, select_split
from harmony.data.sources.selection import KEPT, Rules
from harmony.pixels.images import write_image

_CPU = torch.device("cpu")

BOXES, MASKS = 14_610_229, 2_686_666  # rows of Open Images V7's training split
A_IMAGE = 8.4  # boxes an image there
CHUNK = 500_000  # rows written at a time
SHAPES = 64  # different photographs and masks
MASK = (1024, 768)  # width and height of a mask
BENCH = "harmony-bench"  # FiftyOne dataset that is made and deleted
CLASSES = 600
FLAGS = {"IsOccluded": 0.66, "IsTruncated": 0.25, "IsGroupOf": 0.06, "IsDepiction": 0.05, "IsInside": 0.001}
CLICKS = [f"XClick{n}{axis}" for n in range(1, 5) for axis in "XY"]


def image_ids(numbers: np.ndarray) -> np.ndarray:
    """Open Images' form: 16 hexadecimal digits, in no order of the numbers."""
    return np.array([f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}" for n in numbers.tolist()])


def boxes_of(first: int, images: int, rng: np.random.Generator) -> pl.DataFrame:
    """Box rows of ``images`` images from number ``first`` on: one box on a third of them, many on the rest."""
    alone = rng.random(images) < 1 / 3
    counts = np.where(alone, 1, 2 + rng.poisson(A_IMAGE * 1.5 - 3.5, images))
    owner = np.repeat(np.arange(first, first + images), counts)
    n = len(owner)
    low = rng.random((n, 2)) * 0.7
    high = low + (1 - low) * rng.random((n, 2))
    columns = {
        "ImageID": image_ids(np.arange(first, first + images))[owner - first],
        "Source": ["xclick"] * n,
        "LabelName": [f"/m/{c:05x}" for c in rng.integers(0, CLASSES, n).tolist()],
        "Confidence": [1] * n,
        "XMin": low[:, 0], "XMax": high[:, 0], "YMin": low[:, 1], "YMax": high[:, 1],
    }  # fmt: skip
    columns |= {name: (rng.random(n) < share).astype(np.int8) for name, share in FLAGS.items()}
    columns |= {name: rng.random(n) for name in CLICKS}
    return pl.DataFrame(columns)


def masks_of(boxes: pl.DataFrame, share: float, rng: np.random.Generator) -> pl.DataFrame:
    """Mask rows of a ``share`` of the boxes."""
    chosen = boxes.filter(pl.Series(rng.random(len(boxes)) < share))
    box = pl.Series([f"{n:08x}" for n in rng.integers(0, 2**32, len(chosen)).tolist()])
    label = pl.col("LabelName").str.replace_all("/", "")
    return chosen.select(
        MaskPath=pl.concat_str(pl.col("ImageID"), label, box, separator="_") + ".png",
        ImageID="ImageID", LabelName="LabelName", BoxID=box,
        BoxXMin="XMin", BoxXMax="XMax", BoxYMin="YMin", BoxYMax="YMax",
        PredictedIoU=pl.lit(0.85), Clicks=pl.lit("0.4 0.4 1;0.6 0.6 0"),
    )  # fmt: skip


def write_annotations(
    folder: Path, boxes: int = BOXES, masks: int = MASKS, seed: int = 0, say: Callable[[str], None] = print
) -> Path:
    """``labels/{detections,segmentations}.csv`` of a split with about so many rows; the split's folder."""
    labels, rng = folder / "labels", np.random.default_rng(seed)
    labels.mkdir(parents=True, exist_ok=True)
    written, image, said = [0, 0], 0, time.monotonic()
    with open(labels / "detections.csv", "wb") as detections, open(labels / "segmentations.csv", "wb") as segmentations:
        while written[0] < boxes:
            count = max(1, round(min(CHUNK, boxes - written[0]) / A_IMAGE))
            rows = boxes_of(image, count, rng)
            for part, file, n in ((rows, detections, 0), (masks_of(rows, masks / boxes, rng), segmentations, 1)):
                part.write_csv(file, include_header=image == 0, float_precision=6)
                written[n] += len(part)
            image += count
            if time.monotonic() - said > 10:
                say(f"annotations: {written[0]:,}/{boxes:,} rows written")
                said = time.monotonic()
    say(f"annotations: {written[0]:,} boxes and {written[1]:,} masks of {image:,} images")
    return folder


def ours(folder: Path) -> int:
    """How many images the recipe's rules keep."""
    table, _ = select_split(Split(folder), Rules())
    return int((table["reason"] == KEPT).sum())


def with_pandas(folder: Path) -> int:
    """The same by reading both tables whole, as FiftyOne's importer does."""
    import pandas as pd

    boxes = pd.read_csv(folder / "labels" / "detections.csv")
    masks = pd.read_csv(folder / "labels" / "segmentations.csv")
    single = boxes[~boxes["ImageID"].duplicated(keep=False)]
    masked = masks[~masks["ImageID"].duplicated(keep=False)]
    both = single.merge(masked, on=["ImageID", "LabelName"])
    area = (both["XMax"] - both["XMin"]) * (both["YMax"] - both["YMin"])
    plain = (both[["IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"]] <= 0).all(axis=1)
    rules = Rules()
    return int((plain & (area >= rules.min_area) & (area <= rules.max_area)).sum())


def write_photographs(folder: Path, count: int, say: Callable[[str], None] = print) -> Path:
    """A train split of ``count`` photographs, each with one box and one mask; the dataset's folder.

    Every file has a name of its own, but stands for one of ``SHAPES`` pictures (a hard link).
    """
    split, rng = folder / "train", np.random.default_rng(0)
    ids = image_ids(np.arange(count))
    for place in ("data", "labels", "metadata", *(f"labels/masks/{digit:X}" for digit in range(16))):
        (split / place).mkdir(parents=True, exist_ok=True)
    corners = 0.1 + 0.3 * rng.random((SHAPES, 2))
    for n, (x, y) in enumerate(corners.tolist()):
        write_image(split / f"{n}.jpg", rng.integers(0, 256, (96, 128, 3), dtype=np.uint8))
        mask = np.zeros((MASK[1], MASK[0]), bool)
        mask[round(y * MASK[1]) : round((y + 0.5) * MASK[1]), round(x * MASK[0]) : round((x + 0.5) * MASK[0])] = True
        write_image(split / f"{n}.png", mask)
    shape = np.arange(count) % SHAPES
    names = [f"{id_}_m0_b.png" for id_ in ids]
    for id_, name, n in zip(ids, names, shape.tolist(), strict=True):
        os.link(split / f"{n}.jpg", split / "data" / f"{id_}.jpg")
        os.link(split / f"{n}.png", split / "labels" / "masks" / name[0].upper() / name)
    x, y = corners[shape].T
    box = {"XMin": x, "XMax": x + 0.5, "YMin": y, "YMax": y + 0.5}
    flags = {name: pl.repeat(0, count, eager=True) for name in FLAGS}
    common = {"ImageID": ids, "LabelName": ["/m/00000"] * count}
    pl.DataFrame({**common, "Source": ["xclick"] * count, "Confidence": [1] * count, **box, **flags}).select(
        FULL_HEADER["detections.csv"].split(",")
    ).write_csv(split / "labels" / "detections.csv")
    more = {"MaskPath": names, "BoxID": ["b"] * count, "PredictedIoU": [0.85] * count, "Clicks": [""] * count}
    pl.DataFrame({**common, **more, **{f"Box{name}": value for name, value in box.items()}}).select(
        FULL_HEADER["segmentations.csv"].split(",")
    ).write_csv(split / "labels" / "segmentations.csv")
    (split / "metadata" / "classes.csv").write_text("/m/00000,Thing\n")
    (split / "metadata" / "segmentation_classes.csv").write_text("/m/00000\n")  # FiftyOne's importer wants it
    say(f"photographs: {count:,} to import")
    return folder


def ours_imported(folder: Path) -> int:
    """Selection and import as ``harmony.prepare`` does them: masks cut to their boxes, in files."""
    selection = select(folder, ["train"], Rules())
    return len(import_dataset(BENCH, selection, folder / "work"))


def fiftyone_imported(folder: Path) -> int:
    """The same by FiftyOne's own importer: masks in the database."""
    fo = load_fiftyone()
    kinds = {"dataset_type": fo.types.OpenImagesV7Dataset, "label_types": ["detections", "segmentations"]}
    return len(fo.Dataset.from_dir(str(folder / "train"), name=BENCH, load_hierarchy=False, **kinds))


def forget_imported(folder: Path) -> None:
    """Begin without a database of this name, and with one that answers."""
    fo = load_fiftyone()
    for name in fo.list_datasets(f"{BENCH}*"):
        fo.delete_dataset(name)
    shutil.rmtree(folder / "work", ignore_errors=True)


@dataclass(frozen=True)
class Cost:
    """What one way gave and took: what it ``kept``, CPU and wall seconds, GiB on top of what was held before."""

    kept: int
    cpu_s: float
    wall_s: float
    memory_gib: float


def _measured(way: Callable[[Path], int], folder: Path, answer, around: Callable[[Path], None] | None) -> None:
    if around:
        around(folder)
    cpu, wall, held = time.process_time(), time.perf_counter(), peak_memory(_CPU)
    kept = way(folder)
    answer.send(Cost(kept, time.process_time() - cpu, time.perf_counter() - wall, peak_memory(_CPU) - held))
    if around:
        around(folder)


def alone(way: Callable[[Path], int], folder: Path, around: Callable[[Path], None] | None = None) -> Cost:
    """``way`` in a fresh process, between two calls of ``around`` that do not count."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(way, folder, there, around))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def generated(folder: Path, write: Callable[[Path], Path]) -> Path:
    """What ``write`` makes in ``folder``, kept for the next call; one that was interrupted is made anew."""
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        write(folder)
        (folder / "done").touch()
    return folder


def bench_selection(
    folder: Path, boxes: int, masks: int, blocks: int, say: Callable[[str], None] = print
) -> dict[str, float]:
    """Million box rows a CPU second, ours and pandas; peak memory of both.

    ``folder`` keeps the annotations for the next call. ValueError if the two ways disagree about what is kept.
    """
    split = generated(folder / f"annotations-{boxes}-{masks}", lambda f: write_annotations(f, boxes, masks, say=say))
    found, memory = Rates([], []), [0.0, 0.0]
    for n in range(blocks):
        kept = []
        for way, rates, who in ((ours, found.ours, 0), (with_pandas, found.reference, 1)):
            cost = alone(way, split)
            kept.append(cost.kept)
            rates.append(boxes / 1e6 / cost.cpu_s)
            memory[who] = max(memory[who], cost.memory_gib)
        if kept[0] != kept[1]:
            raise ValueError(f"{kept[0]} images by the selection, {kept[1]} by pandas")
        say(f"block {n + 1}/{blocks}: {found.ours[-1]:.2f} against {found.reference[-1]:.2f} million rows a CPU second")
    return found.figures() | {"memory_gib": memory[0], "reference_memory_gib": memory[1], "kept": kept[0]}


def bench_import(
    folder: Path, samples: int, compared: int, blocks: int, say: Callable[[str], None] = print
) -> dict[str, float]:
    """Samples a second of wall time into FiftyOne with their masks, ours and FiftyOne's importer, of ``compared``
    photographs; and ours of ``samples``, once.

    ``folder`` keeps the photographs for the next call. ValueError if something is not imported.
    """
    few, many = (
        generated(folder / f"photographs-{count}", lambda f, count=count: write_photographs(f, count, say))
        for count in (compared, samples)
    )
    found = Rates([], [])

    def rate(way: Callable[[Path], int], place: Path, count: int) -> tuple[float, Cost]:
        cost = alone(way, place, forget_imported)
        if cost.kept != count:
            raise ValueError(f"{cost.kept} of {count} photographs were imported")
        return count / cost.wall_s, cost

    for n in range(blocks):
        for way, rates in ((ours_imported, found.ours), (fiftyone_imported, found.reference)):
            rates.append(rate(way, few, compared)[0])
        say(f"block {n + 1}/{blocks}: {found.ours[-1]:.0f} against {found.reference[-1]:.0f} samples a second")
    at_scale, cost = rate(ours_imported, many, samples)
    say(f"{samples:,} samples: {at_scale:.0f} a second, {cost.memory_gib:.2f} GiB")
    return found.figures() | {"samples": samples, "at_scale": at_scale, "memory_gib": cost.memory_gib}
