"""Fuzzers of what people bring: each reader returns something or raises UserError, whatever the bytes, and never hangs.

The mutations follow from a seed; a failure shows the bytes.
"""

import csv
import io
import json
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harmony.core.errors import UserError
from harmony.data.manifest import read_manifest
from harmony.data.sources.open_images.layout import FULL_HEADER
from harmony.data.sources.open_images.select import select
from harmony.data.sources.selection import Rules, read_ids
from harmony.methods.inputs import list_composites
from harmony.pixels.color_profiles import read_photograph
from harmony.pixels.images import list_formats, read_image, write_image
from harmony.pixels.masks import read_mask

SECONDS, HANG = 60, 20  # of a fuzzer, shared by its kinds of files; of one input
SIZE = (24, 16)
MODES = ("1", "L", "P", "LA", "RGBA", "I;16")  # of a mask
TABLES = (
    "labels/detections.csv", "labels/segmentations.csv", "metadata/sources.csv", "metadata/image_ids.csv",
    "metadata/classes.csv",
)  # fmt: skip
HOSTILE = [  # pieces that break parsers: of text, CSV, JSON, numbers, paths
    "\x00", "\ufeff", "\u2028", "\u0085", "\r", "\n", "\r\n", ",", ";", '"', '""', "'", "\\", "{", "}", "[", "]",
    ":", "-1", "0", "1e999", "nan", "NaN", "Infinity", "9" * 40, "1.5", "null", "true", "\\ud800", "\\u0000", "../..",
    "/", ".", "..", "~", "a" * 300, "[" * 2000, '{"a":' * 500, "${x}", "???", "\t", " ", "é", "\U0001f600",
]  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few changes of ``data``: bits, bytes, pieces that are cut, doubled, moved or hostile, a torn end."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at, length = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 16, 200))
        piece = out[at : at + length]
        match rng.randrange(8):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.randrange(256)
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = piece * rng.choice((1, 2, 50))
            case 4:
                there = rng.randrange(len(out) + 1)
                out[there:there] = piece
            case 5 | 6:
                out[at : at + rng.choice((0, 0, length))] = rng.choice(HOSTILE).encode("utf-8", "surrogatepass")
            case 7 if rng.random() < 0.3:
                del out[at:]
    return bytes(out)


@contextmanager
def limit_time(seconds: int) -> Iterator[None]:
    """TimeoutError in the block after ``seconds``."""

    def stop(*args):
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(path: Path, read: Callable[[], object], kinds: int = 1) -> int:
    """Mutate the file ``path``, one of ``kinds``, and ``read`` it each time; how many inputs that were."""
    data, rng, end, count = path.read_bytes(), random.Random(0), time.monotonic() + SECONDS / kinds, 0
    while time.monotonic() < end:
        path.write_bytes(mutation := mutate(data, rng))
        count += 1
        try:
            with warnings.catch_warnings(), limit_time(HANG):
                warnings.simplefilter("ignore")
                read()
        except UserError as error:
            assert "\n" not in str(error), mutation
        except BaseException as error:
            pytest.fail(f"{type(error).__name__}: {str(error)[:300]} on {mutation[:3000]!r}")
    path.write_bytes(data)
    return count


@pytest.mark.slow
def test_manifests(small_manifest, tmp_path):
    path = small_manifest(tmp_path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]).replace('"rows": 21', '"rows": 3'))
    assert fuzz(path, lambda: read_manifest(path)) > 100


def write_annotations(root: Path) -> Path:
    """One split in Open Images layout: three images, one instance each."""
    folder, names = root / "train", ("a0", "a1", "b2")
    files = {
        "labels/detections.csv": [FULL_HEADER["detections.csv"]]
        + [f"{n},xclick,/m/cat,1,0.25,0.75,0.25,0.75,0,0,0,0,0" for n in names],
        "labels/segmentations.csv": [FULL_HEADER["segmentations.csv"]]
        + [f"{n}_0.png,{n},/m/cat,b,0.25,0.75,0.25,0.75,0.8," for n in names],
        "metadata/sources.csv": ["ImageID,Source", *(f"{n},ccp" for n in names)],
        "metadata/image_ids.csv": ["ImageID,Subset", *(f"{n},train" for n in names)],
        "metadata/classes.csv": ["/m/cat,Cat", '"/m/dog","Dog, small"'],
    }
    for name, lines in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(lines) + "\n")
    for n in names:
        (folder / "data").mkdir(exist_ok=True)
        write_image(folder / "data" / f"{n}.jpg", np.zeros((16, 24, 3), np.uint8))
        write_image(folder / "labels" / "masks" / n[0].upper() / f"{n}_0.png", np.ones((16, 24), bool))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_open_images(name, tmp_path):
    root = write_annotations(tmp_path)
    rules = Rules(sources=["ccp"], classes=["Cat"])
    assert set(select(root, ["train"], rules).table["reason"]) == {"kept"}
    assert fuzz(root / "train" / name, lambda: select(root, ["train"], rules).table, len(TABLES)) > 10


@pytest.mark.slow
def test_lists_of_ids(tmp_path):
    path = tmp_path / "ids.csv"
    path.write_text("ImageID\n0001\ntrain/a0\nb2,train\n")
    assert fuzz(path, lambda: read_ids(Rules(image_ids=str(path)))) > 100


@pytest.mark.slow
def test_an_index_of_composites(tmp_path):
    text = io.StringIO()
    rows = [["id", "background", "foreground", "foreground_mask", "bbox", "composite", "mask"]]
    rows += [["one", "b.png", "f.png", "m.png", "2 3 9 10", "", ""], ["two", "", "", "", "", "c.png", "m.png"]]
    csv.writer(text).writerows(rows)
    path = tmp_path / "index.csv"
    path.write_text(text.getvalue())
    assert fuzz(path, lambda: json.dumps(list_composites(tmp_path)).encode()) > 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", list_formats())
def test_pictures(kind, tmp_path, swapped_profile):
    """Each format as a photograph with a color profile, and as a mask."""
    path = tmp_path / f"picture.{kind.lower()}"
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, kind, **({} if kind == "BMP" else {"icc_profile": swapped_profile}))

    def read() -> None:
        for reader in (read_image, read_photograph, lambda p: read_mask(p, SIZE)):
            try:
                reader(path)
            except UserError as error:
                assert "\n" not in str(error)

    assert fuzz(path, read, len(list_formats())) > 10


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_masks(mode, tmp_path):
    """Each mode of a PNG as a mask."""
    path, mask = tmp_path / "mask.png", np.zeros((SIZE[1], SIZE[0]), np.uint8)
    mask[4:12, 6:18] = 255
    (Image.fromarray(mask.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(mask).convert(mode)).save(
        path
    )
    assert read_mask(path, SIZE).any()
    assert fuzz(path, lambda: read_mask(path, SIZE), len(MODES)) > 10
