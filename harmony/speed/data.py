"""F5. Selection over annotations of Open Images' true schema and size, against what a script with pandas does.

The annotations are generated: 21 columns a box as in the training split, several boxes on most images, masks for some.
"""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import torch

from harmony.data.select import KEPT, Rules, select_split
from harmony.speed.measure import Rates, peak_memory

_CPU = torch.device("cpu")

BOXES, MASKS = 14_610_229, 2_686_666  # rows of Open Images V7's training split
A_IMAGE = 8.4  # boxes an image there
CHUNK = 500_000  # rows written at a time
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
    table, _ = select_split(folder, "train", Rules())
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


def _measured(way: Callable[[Path], int], folder: Path, answer) -> None:
    began, held = time.process_time(), peak_memory(_CPU)
    kept = way(folder)
    answer.send((kept, time.process_time() - began, peak_memory(_CPU) - held))


def alone(way: Callable[[Path], int], folder: Path) -> tuple[int, float, float]:
    """(images kept, CPU seconds, GiB on top of what was held before) of ``way`` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(way, folder, there))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def bench_data(folder: Path, boxes: int, masks: int, blocks: int, say: Callable[[str], None] = print):
    """Figures of selection: million box rows a CPU second, ours and pandas; peak memory of both.

    ``folder`` keeps the annotations for the next call. ValueError if the two ways disagree about what is kept.
    """
    split = folder / f"annotations-{boxes}-{masks}"
    if not (split / "done").exists():
        write_annotations(split, boxes, masks, say=say)
        (split / "done").touch()
    found, memory = Rates([], []), [0.0, 0.0]
    for n in range(blocks):
        kept = []
        for way, rates, who in ((ours, found.ours, 0), (with_pandas, found.reference, 1)):
            number, seconds, peak = alone(way, split)
            kept.append(number)
            rates.append(boxes / 1e6 / seconds)
            memory[who] = max(memory[who], peak)
        if kept[0] != kept[1]:
            raise ValueError(f"{kept[0]} images by the selection, {kept[1]} by pandas")
        say(f"block {n + 1}/{blocks}: {found.ours[-1]:.2f} against {found.reference[-1]:.2f} million rows a CPU second")
    return found.figures() | {"memory_gib": memory[0], "reference_memory_gib": memory[1], "kept": kept[0]}
