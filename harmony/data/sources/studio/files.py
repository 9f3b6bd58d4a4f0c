"""Files of the studio dataset: renders, and their tables in Open Images V7 layout."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from pathlib import Path

from harmony.core.files import write_text
from harmony.core.pieces import make_pieces
from harmony.core.signals import worker_pool
from harmony.data.sources.open_images.layout import FULL_HEADER, IMAGE, MASK
from harmony.data.sources.studio.rendering import mitsuba, render, save
from harmony.data.sources.studio.scenes import Scene, scene
from harmony.data.sources.studio.shapes import KINDS
from harmony.pixels.masks import bounding_box, read_mask

TRUTHS = {"plate": "plates/{}.jpg", "relit": "relit/{}.jpg", "shadow": "shadows/{}.png"}  # beside ``data/``


def mid(kind: str) -> str:
    """The machine id of a kind."""
    return f"/m/{kind}"


def box_id(s: Scene) -> str:
    """The box id of a scene's object."""
    return hashlib.sha256(f"box {s.id}".encode()).hexdigest()[:8]


def mask_name(s: Scene) -> str:
    """The name of a scene's mask file, as in Open Images."""
    return f"{s.id}_{mid(s.kind).replace('/', '')}_{box_id(s)}.png"


def scene_files(s: Scene, root: Path) -> dict[str, Path]:
    """The files of a scene's frames. ``image`` is written last: if it exists, the scene is complete."""
    folder = root / s.split
    truths = {name: folder / pattern.format(s.id) for name, pattern in TRUTHS.items()}
    mask = folder / MASK.format(s.id[0].upper(), mask_name(s))
    return truths | {"mask": mask, "image": folder / IMAGE.format(s.id)}


def render_files(s: Scene, root: Path, size: int, samples: int, plate: bool) -> None:
    """Render one scene into the dataset folder ``root``; its photograph is written last."""
    frames = render(s, size, samples, plate)
    for name, path in scene_files(s, root).items():
        picture = getattr(frames, name)
        if picture is not None:
            save(path, picture)


def write_table(path: Path, header: Iterable[str] | None, rows: Iterable[Iterable]) -> None:
    """Write a CSV file atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_labels(scenes: list[Scene], root: Path) -> None:
    """Write a split's tables in Open Images V7 layout, its captions (light A, then light B) and ``scenes.csv``."""
    detections, segmentations, table, captions = [], [], [], {}
    for s in scenes:
        mask = read_mask(scene_files(s, root)["mask"], empty=True)
        if not mask.any():
            continue
        x0, y0, x1, y1 = bounding_box(mask)
        height, width = mask.shape
        is_truncated = int(x0 == 0 or y0 == 0 or x1 == width or y1 == height)
        box = [f"{v:.6f}" for v in (x0 / width, x1 / width, y0 / height, y1 / height)]
        detections.append([s.id, "xclick", mid(s.kind), 1, *box, 0, is_truncated, 0, 0, 0])
        segmentations.append(
            [mask_name(s), s.id, mid(s.kind), box_id(s), box[0], box[1], box[2], box[3], "0.00000", ""]
        )
        table.append([s.id, s.index, s.kind, s.color, s.finish, s.ground, s.light, s.relight])
        captions[s.id] = [s.caption(), s.caption(s.relight)]
    folder = root / scenes[0].split
    for name, rows in (("detections.csv", detections), ("segmentations.csv", segmentations)):
        write_table(folder / "labels" / name, FULL_HEADER[name].split(","), rows)
    write_table(folder / "metadata" / "classes.csv", None, [(mid(k), k.capitalize()) for k in sorted(KINDS)])
    write_table(folder / "metadata" / "segmentation_classes.csv", None, [(mid(k),) for k in sorted(KINDS)])
    write_table(folder / "metadata" / "image_ids.csv", ["ImageID"], [(s.id,) for s in scenes])
    columns = "ImageID index kind color finish ground light relight"
    write_table(folder / "metadata" / "scenes.csv", columns.split(), table)
    hierarchy = {"LabelName": "Entity", "Subcategory": [{"LabelName": k.capitalize()} for k in sorted(KINDS)]}
    write_text(folder / "metadata" / "hierarchy.json", json.dumps(hierarchy) + "\n")
    write_text(folder / "metadata" / "human_captions.json", json.dumps(captions, indent=0) + "\n")


def render_scenes(
    what: str,
    scenes: Iterable[Hashable],
    is_done: Callable[[Hashable], bool],
    render: Callable[[Hashable], None],
    every: int,
    workers: int | None = None,
) -> None:
    """``render`` the scenes that are not done, in ``workers`` processes (None: one for each core).

    A scene is whatever ``render`` takes.
    """
    missing = dict.fromkeys((s for s in scenes if not is_done(s)), 1)
    if missing:
        mitsuba()
        with worker_pool(workers or os.cpu_count()) as pool:
            through = partial(pool.imap_unordered, chunksize=4)
            make_pieces(what, missing, lambda s: False, render, "scenes", every=every, through=through)


def generate(
    root: Path,
    count: int,
    size: int = 128,
    samples: int = 32,
    seed: int = 0,
    start: int = 0,
    splits: tuple[str, ...] = ("train", "validation", "test"),
    plate: bool = True,
    workers: int | None = None,
) -> Path:
    """Render scenes ``start .. start + count - 1`` of ``splits`` into ``root``; returns it.

    Complete scenes are not rendered again. ``size`` in pixels, ``samples`` per pixel; ``plate=False`` leaves out plate
    and shadow, which the training of a backbone does not need.
    """
    root = Path(root)
    scenes = [s for s in (scene(i, seed) for i in range(start, start + count)) if s.split in splits]
    render_one = partial(render_files, root=root, size=size, samples=samples, plate=plate)
    render_scenes("studio", scenes, lambda s: scene_files(s, root)["image"].exists(), render_one, 50, workers)
    for split in splits:
        if members := [s for s in scenes if s.split == split]:
            write_labels(members, root)
    return root
