"""Benchmarks of selection against a pandas script and of the FiftyOne import against FiftyOne's own importer.

Selection reads generated annotations with the schema and size of Open Images: 21 columns a box as in the training
split, several boxes on most images, masks for some. Each photograph to import has one box and one mask, a separate
file of 1024 x 768 px.
"""

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import polars as pl
import torch

from harmony.benchmarks.measure import Rates, measure_peak_memory
from harmony.core.progress import tell
from harmony.data.sources.open_images.database import import_dataset, load_fiftyone
from harmony.data.sources.open_images.layout import FULL_HEADER, Split
from harmony.data.sources.open_images.select import select, select_split
from harmony.data.sources.selection import KEPT, Rules
from harmony.pixels.images import write_image

_CPU = torch.device("cpu")

BOXES, MASKS = 14_610_229, 2_686_666  # rows of Open Images V7's training split
BOXES_PER_IMAGE = 8.4  # mean of that split
CHUNK_ROWS = 500_000  # rows written at a time
SHAPE_COUNT = 64  # different pictures and masks among the photographs
MASK_SIZE = (1024, 768)  # width and height of a mask
DATASET_NAME = "harmony-bench"  # FiftyOne dataset that is created and deleted
CLASSES = 600
FLAGS = {"IsOccluded": 0.66, "IsTruncated": 0.25, "IsGroupOf": 0.06, "IsDepiction": 0.05, "IsInside": 0.001}
CLICKS = [f"XClick{n}{axis}" for n in range(1, 5) for axis in "XY"]


def format_image_ids(numbers: np.ndarray) -> np.ndarray:
    """Image ids in the form of Open Images: 16 hexadecimal digits, not in the order of ``numbers``."""
    return np.array([f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}" for n in numbers.tolist()])


def generate_boxes(first: int, images: int, rng: np.random.Generator) -> pl.DataFrame:
    """Box rows of ``images`` images, numbered from ``first``: one box on a third of them, many on the rest."""
    is_single = rng.random(images) < 1 / 3
    counts = np.where(is_single, 1, 2 + rng.poisson(BOXES_PER_IMAGE * 1.5 - 3.5, images))
    images_of_boxes = np.repeat(np.arange(images), counts)
    n = len(images_of_boxes)
    low = rng.random((n, 2)) * 0.7
    high = low + (1 - low) * rng.random((n, 2))
    columns = {
        "ImageID": format_image_ids(np.arange(first, first + images))[images_of_boxes],
        "Source": ["xclick"] * n,
        "LabelName": [f"/m/{c:05x}" for c in rng.integers(0, CLASSES, n).tolist()],
        "Confidence": [1] * n,
        "XMin": low[:, 0], "XMax": high[:, 0], "YMin": low[:, 1], "YMax": high[:, 1],
    }  # fmt: skip
    columns |= {name: (rng.random(n) < share).astype(np.int8) for name, share in FLAGS.items()}
    columns |= {name: rng.random(n) for name in CLICKS}
    return pl.DataFrame(columns)


def generate_masks(boxes: pl.DataFrame, share: float, rng: np.random.Generator) -> pl.DataFrame:
    """Mask rows of a random ``share`` of the boxes."""
    rows = boxes.filter(pl.Series(rng.random(len(boxes)) < share))
    box = pl.Series([f"{n:08x}" for n in rng.integers(0, 2**32, len(rows)).tolist()])
    label = pl.col("LabelName").str.replace_all("/", "")
    return rows.select(
        MaskPath=pl.concat_str(pl.col("ImageID"), label, box, separator="_") + ".png",
        ImageID="ImageID", LabelName="LabelName", BoxID=box,
        BoxXMin="XMin", BoxXMax="XMax", BoxYMin="YMin", BoxYMax="YMax",
        PredictedIoU=pl.lit(0.85), Clicks=pl.lit("0.4 0.4 1;0.6 0.6 0"),
    )  # fmt: skip


def write_annotations(
    folder: Path, boxes: int = BOXES, masks: int = MASKS, seed: int = 0, say: Callable[[str], None] = tell
) -> Path:
    """Write ``labels/{detections,segmentations}.csv`` with about so many rows; returns the split's folder."""
    labels, rng = folder / "labels", np.random.default_rng(seed)
    labels.mkdir(parents=True, exist_ok=True)
    counts, image, last_report = [0, 0], 0, time.monotonic()
    with open(labels / "detections.csv", "wb") as detections, open(labels / "segmentations.csv", "wb") as segmentations:
        while counts[0] < boxes:
            count = max(1, round(min(CHUNK_ROWS, boxes - counts[0]) / BOXES_PER_IMAGE))
            rows = generate_boxes(image, count, rng)
            for part, file, n in ((rows, detections, 0), (generate_masks(rows, masks / boxes, rng), segmentations, 1)):
                part.write_csv(file, include_header=image == 0, float_precision=6)
                counts[n] += len(part)
            image += count
            if time.monotonic() - last_report > 10:
                say(f"annotations: {counts[0]:,}/{boxes:,} rows written")
                last_report = time.monotonic()
    say(f"annotations: {counts[0]:,} boxes and {counts[1]:,} masks of {image:,} images")
    return folder


def count_by_selection(folder: Path) -> int:
    """How many images our selection keeps by its default rules."""
    table, _ = select_split(Split(folder), Rules())
    return int((table["reason"] == KEPT).sum())


def count_by_pandas(folder: Path) -> int:
    """The same count by pandas, which reads both tables whole, as FiftyOne's importer does."""
    import pandas as pd

    boxes = pd.read_csv(folder / "labels" / "detections.csv")
    masks = pd.read_csv(folder / "labels" / "segmentations.csv")
    single_boxes = boxes[~boxes["ImageID"].duplicated(keep=False)]
    single_masks = masks[~masks["ImageID"].duplicated(keep=False)]
    pairs = single_boxes.merge(single_masks, on=["ImageID", "LabelName"])
    area = (pairs["XMax"] - pairs["XMin"]) * (pairs["YMax"] - pairs["YMin"])
    is_plain = (pairs[["IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"]] <= 0).all(axis=1)
    rules = Rules()
    return int((is_plain & (area >= rules.min_area) & (area <= rules.max_area)).sum())


def write_photographs(folder: Path, count: int, say: Callable[[str], None] = tell) -> Path:
    """Write a train split of ``count`` photographs, each with one box and one mask; returns the dataset's folder.

    The files are hard links to ``SHAPE_COUNT`` different pictures and masks.
    """
    split, rng = folder / "train", np.random.default_rng(0)
    ids, (width, height) = format_image_ids(np.arange(count)), MASK_SIZE
    for name in ("data", "labels", "metadata", *(f"labels/masks/{digit:X}" for digit in range(16))):
        (split / name).mkdir(parents=True, exist_ok=True)
    corners = 0.1 + 0.3 * rng.random((SHAPE_COUNT, 2))
    for n, (x, y) in enumerate(corners.tolist()):
        write_image(split / f"{n}.jpg", rng.integers(0, 256, (96, 128, 3), dtype=np.uint8))
        mask = np.zeros((height, width), bool)
        mask[round(y * height) : round((y + 0.5) * height), round(x * width) : round((x + 0.5) * width)] = True
        write_image(split / f"{n}.png", mask)
    shape = np.arange(count) % SHAPE_COUNT
    names = [f"{id_}_m0_b.png" for id_ in ids]
    for id_, name, n in zip(ids, names, shape.tolist(), strict=True):
        os.link(split / f"{n}.jpg", split / "data" / f"{id_}.jpg")
        os.link(split / f"{n}.png", split / "labels" / "masks" / name[0].upper() / name)
    x, y = corners[shape].T
    box = {"XMin": x, "XMax": x + 0.5, "YMin": y, "YMax": y + 0.5}
    flags = {name: pl.repeat(0, count, eager=True) for name in FLAGS}
    shared_columns = {"ImageID": ids, "LabelName": ["/m/00000"] * count}
    pl.DataFrame({**shared_columns, "Source": ["xclick"] * count, "Confidence": [1] * count, **box, **flags}).select(
        FULL_HEADER["detections.csv"].split(",")
    ).write_csv(split / "labels" / "detections.csv")
    mask_columns = {"MaskPath": names, "BoxID": ["b"] * count, "PredictedIoU": [0.85] * count, "Clicks": [""] * count}
    pl.DataFrame({**shared_columns, **mask_columns, **{f"Box{name}": value for name, value in box.items()}}).select(
        FULL_HEADER["segmentations.csv"].split(",")
    ).write_csv(split / "labels" / "segmentations.csv")
    (split / "metadata" / "classes.csv").write_text("/m/00000,Thing\n")
    (split / "metadata" / "segmentation_classes.csv").write_text("/m/00000\n")  # FiftyOne's importer needs it
    say(f"photographs: {count:,} to import")
    return folder


def import_by_harmony(folder: Path) -> int:
    """Select and import as ``harmony.prepare`` does, with masks as files; returns the sample count."""
    return len(import_dataset(DATASET_NAME, select(folder, ["train"], Rules())))


def import_by_fiftyone(folder: Path) -> int:
    """Import by FiftyOne's own importer, which cuts masks and stores them in the database; returns the sample count."""
    fo = load_fiftyone()
    options = {"dataset_type": fo.types.OpenImagesV7Dataset, "label_types": ["detections", "segmentations"]}
    return len(fo.Dataset.from_dir(str(folder / "train"), name=DATASET_NAME, load_hierarchy=False, **options))


def delete_imports(folder: Path) -> None:
    """Delete what the benchmark imported; also makes sure that the database answers."""
    fo = load_fiftyone()
    for name in fo.list_datasets(f"{DATASET_NAME}*"):
        fo.delete_dataset(name)


@dataclass(frozen=True)
class Cost:
    """What one way cost: CPU and wall seconds, GiB beyond the earlier peak; ``count``: the images that it kept."""

    count: int
    cpu_s: float
    wall_s: float
    memory_gib: float


def _send_cost(
    way: Callable[[Path], int], folder: Path, pipe: Connection, reset: Callable[[Path], None] | None
) -> None:
    if reset:
        reset(folder)
    cpu, wall, memory = time.process_time(), time.perf_counter(), measure_peak_memory(_CPU)
    count = way(folder)
    pipe.send(Cost(count, time.process_time() - cpu, time.perf_counter() - wall, measure_peak_memory(_CPU) - memory))
    if reset:
        reset(folder)


def measure_cost(way: Callable[[Path], int], folder: Path, reset: Callable[[Path], None] | None = None) -> Cost:
    """The cost of ``way`` in a fresh process; ``reset`` is called before and after and does not count."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_cost, args=(way, folder, sender, reset))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def generate_once(folder: Path, write: Callable[[Path], Path]) -> Path:
    """Call ``write`` for ``folder`` unless an earlier call completed it; returns the folder."""
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        write(folder)
        (folder / "done").touch()
    return folder


def bench_selection(
    folder: Path, boxes: int, masks: int, blocks: int, say: Callable[[str], None] = tell
) -> dict[str, float]:
    """Millions of box rows a CPU second, ours and pandas, with the peak memory of both.

    ``folder`` keeps the annotations for the next call. ValueError if the two keep different numbers of images.
    """
    name = f"annotations-{boxes}-{masks}"
    split = generate_once(folder / name, lambda f: write_annotations(f, boxes, masks, say=say))
    rates, memory = Rates([], []), [0.0, 0.0]
    for n in range(blocks):
        counts = []
        for way, series, side in ((count_by_selection, rates.ours, 0), (count_by_pandas, rates.reference, 1)):
            cost = measure_cost(way, split)
            counts.append(cost.count)
            series.append(boxes / 1e6 / cost.cpu_s)
            memory[side] = max(memory[side], cost.memory_gib)
        if counts[0] != counts[1]:
            raise ValueError(f"{counts[0]} images by the selection, {counts[1]} by pandas")
        say(f"block {n + 1}/{blocks}: {rates.ours[-1]:.2f} against {rates.reference[-1]:.2f} million rows a CPU second")
    return rates.summarize() | {"memory_gib": memory[0], "reference_memory_gib": memory[1], "kept": counts[0]}


def bench_import(
    folder: Path, samples: int, reference_samples: int, blocks: int, say: Callable[[str], None] = tell
) -> dict[str, float]:
    """Samples with masks imported into FiftyOne a second of wall time, ours and FiftyOne's importer.

    The two are compared on ``reference_samples`` photographs; ours then also imports ``samples``, once. ``folder``
    keeps the photographs for the next call. ValueError if a photograph is not imported.
    """
    small_folder, large_folder = (
        generate_once(folder / f"photographs-{count}", lambda f, count=count: write_photographs(f, count, say))
        for count in (reference_samples, samples)
    )
    rates = Rates([], [])

    def measure_import(way: Callable[[Path], int], photographs: Path, count: int) -> tuple[float, Cost]:
        cost = measure_cost(way, photographs, delete_imports)
        if cost.count != count:
            raise ValueError(f"{cost.count} of {count} photographs were imported")
        return count / cost.wall_s, cost

    for n in range(blocks):
        for way, series in ((import_by_harmony, rates.ours), (import_by_fiftyone, rates.reference)):
            series.append(measure_import(way, small_folder, reference_samples)[0])
        say(f"block {n + 1}/{blocks}: {rates.ours[-1]:.0f} against {rates.reference[-1]:.0f} samples a second")
    at_scale, cost = measure_import(import_by_harmony, large_folder, samples)
    say(f"{samples:,} samples: {at_scale:.0f} a second, {cost.memory_gib:.2f} GiB")
    return rates.summarize() | {"samples": samples, "at_scale": at_scale, "memory_gib": cost.memory_gib}
