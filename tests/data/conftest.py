"""A small folder in Open Images V7 layout, one image for each thing that can be wrong with one."""

import csv
from pathlib import Path

import numpy as np
import pytest

from harmony.data.sources.open_images.select import FULL_HEADER
from harmony.pixels.images import write_image

DETECTIONS, SEGMENTATIONS = FULL_HEADER["detections.csv"], FULL_HEADER["segmentations.csv"]
BOX = (0.25, 0.75, 0.25, 0.75)  # XMin, XMax, YMin, YMax
SIZE = (40, 32)  # width, height


class Folder:
    """Writes images, boxes and masks of one split."""

    def __init__(self, root: Path, split: str = "train") -> None:
        self.root, self.split = root, split
        self.folder = root / split
        self.boxes, self.masks, self.sources = [], [], []

    def image(self, id_: str, source: str = "ccp") -> None:
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(self.sources)).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        write_image(self.folder / "data" / f"{id_}.jpg", pixels)
        self.sources.append([id_, source])

    def box(self, id_: str, label: str = "/m/cat", box: tuple = BOX, **flags: int) -> None:
        names = ("occluded", "truncated", "group", "depiction", "inside")
        self.boxes.append([id_, "xclick", label, 1, *box, *(flags.get(n, 0) for n in names)])

    def mask(self, id_: str, label: str = "/m/cat", box: tuple = BOX, fill: float = 1, size: tuple = SIZE) -> None:
        """A mask that fills the left ``fill`` of its box."""
        name = f"{id_}_{len(self.masks)}.png"
        path = self.folder / "labels" / "masks" / id_[0].upper() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((size[1], size[0]), dtype=bool)
        x0, x1, y0, y1 = (round(v * side) for v, side in zip(box, (size[0], size[0], size[1], size[1]), strict=True))
        pixels[y0:y1, x0 : x0 + round(fill * (x1 - x0))] = True
        write_image(path, pixels)
        self.masks.append([name, id_, label, "b", *box, 0.8, ""])

    def single(self, id_: str, **kwargs: object) -> None:
        """One image with one box and one mask."""
        self.image(id_)
        self.box(id_, **kwargs)
        self.mask(id_)

    def write(self) -> Path:
        for name, header, rows in (
            ("labels/detections.csv", DETECTIONS, self.boxes),
            ("labels/segmentations.csv", SEGMENTATIONS, self.masks),
            ("metadata/sources.csv", "ImageID,Source", self.sources),
            ("metadata/classes.csv", None, [["/m/cat", "Cat"], ["/m/dog", "Dog"]]),
        ):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([header.split(",")] if header else [])
                csv.writer(file, lineterminator="\n").writerows(rows)
        return self.root


@pytest.fixture
def make_folder():
    """``make_folder(root, split)``: an empty ``Folder``."""
    return Folder
