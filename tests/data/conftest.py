"""Small folders in Open Images V7 layout."""

import csv
from pathlib import Path

import numpy as np
import pytest

from harmony.data.sources.open_images.layout import FULL_HEADER
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


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three splits of photographs, 60 x 40, two sources; one undecodable, one whose largest box is too small."""
    root = tmp_path_factory.mktemp("photos") / "mini"
    for split in ("train", "validation", "test"):
        folder = root / split
        for sub in ("data", "labels/masks/A", "metadata"):
            (folder / sub).mkdir(parents=True)
        rows, sources = [], []
        for n, (name, boxes) in enumerate(
            {"a1": [(0.1, 0.5), (0.0, 0.9), (0.6, 0.8)], "a2": [(0.2, 0.6)], "a3": [(0.4, 0.5)]}.items()
        ):
            write_image(folder / "data" / f"{name}.jpg", np.full((40, 60, 3), 40 * n + 20, np.uint8))
            sources.append(f"{name},{'ccp' if n == 0 else 'secret'}")
            for k, (low, high) in enumerate(boxes):
                mask = np.zeros((40, 60), bool)
                mask[int(40 * low) : int(40 * high), int(60 * low) : int(60 * high)] = True
                write_image(folder / "labels/masks/A" / f"{name}_{k}.png", mask)
                rows.append(f"{name}_{k}.png,{name},/m/cat,b{k},{low},{high},{low},{high},0,")
        rows.append("a4_0.png,a4,/m/cat,b,0.1,0.9,0.1,0.9,0,")
        (folder / "data" / "a4.jpg").write_bytes(b"no picture")
        sources.append("a4,ccp")
        header = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
        (folder / "labels" / "segmentations.csv").write_text("\n".join([header, *rows]) + "\n")
        (folder / "metadata" / "sources.csv").write_text("\n".join(["ImageID,Source", *sources]) + "\n")
        (folder / "metadata" / "classes.csv").write_text("/m/cat,Cat\n")
    return root


@pytest.fixture
def render_here(monkeypatch):
    """The pool of renderers works in this process, and needs no Mitsuba."""
    from harmony.data.sources.studio import files

    class Pool:
        def __init__(self, workers):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def imap_unordered(self, function, jobs, chunksize):
            return map(function, jobs)

    monkeypatch.setattr(files, "mitsuba", lambda: None)
    monkeypatch.setattr(files, "worker_pool", Pool)
