"""The training pixels of a backbone: studio renders under both lights, and photographs whose license permits it.

A photograph is kept with its largest instance, even if it shows others: a VAE needs pixels, not single instances.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from harmony.core.errors import UserError
from harmony.core.row import SPLITS, Row
from harmony.data.captions import label_caption
from harmony.data.manifest import write_manifest
from harmony.data.sources.files import tell_omissions
from harmony.data.sources.open_images.layout import Split, has_bad_name, mask_path
from harmony.data.sources.studio.files import TRUTHS, generate
from harmony.data.stamps import write_stamps
from harmony.pixels.images import read_image, sha256
from harmony.pixels.masks import bounding_box, read_mask

AREA = (0.02, 0.8)  # share of the photograph that an instance may cover, as in all datasets


def largest_instances(split: Split) -> dict[str, tuple[str, str]]:
    """Map image ids to (mask file in the split, label) of the largest box within AREA."""
    area = (pl.col("BoxXMax") - pl.col("BoxXMin")) * (pl.col("BoxYMax") - pl.col("BoxYMin"))
    table = split.masks(pl.Float64).filter(~pl.col("damaged") & ~has_bad_name()).collect().with_columns(area=area)
    table = table.filter(pl.col("area").is_between(*AREA)).sort("area", descending=True).unique("ImageID", keep="first")
    names = split.class_names()
    columns = table.select("ImageID", mask_path(), "LabelName")
    return {image: (mask, names.get(label, label)) for image, mask, label in columns.iter_rows()}


def find_permitted_images(split: Split, sources: Iterable[str]) -> set[str]:
    """The ids of the photographs from ``sources``. UserError if the split has no sources."""
    if (table := split.sources()) is None:
        raise UserError(
            f"{split.folder}: no metadata/sources.csv, so no photograph may train; add it, or set dataset.sources=null"
        )
    return set(table.filter(pl.col("source").is_in(list(sources))).collect()["ImageID"])


def read_rows(folder: Path, split: str, relative_to: Path, sources: Iterable[str] | None = None) -> list[Row]:
    """Read the rows of one split folder in Open Images layout; unreadable pictures and masks are left out with a line.

    A studio scene gives two rows, under its light A and under its light B, with matching captions; each is the
    ``relit`` picture of the other.
    """
    files = Split(folder)
    instances, captions = largest_instances(files), files.captions()
    ids = set(instances) if sources is None else set(instances) & find_permitted_images(files, sources)
    extras = {"source": "studio"} if files.metadata("scenes.csv") else {}
    rows, omissions = [], []
    for id_ in sorted(ids):
        mask_file, label = instances[id_]
        path = files.image(id_)
        try:
            height, width = read_image(path).shape[:2]
            mask = read_mask(folder / mask_file, (width, height), resize=True)
        except UserError:
            omissions.append(id_)
            continue
        texts = captions.get(id_) or [label_caption(label)]
        box = tuple(float(v) for v in bounding_box(mask))
        relit = folder / TRUTHS["relit"].format(id_)
        pictures = [(id_, path, texts[0])]
        if relit.exists() and len(texts) > 1:
            pictures.append((f"{id_}b", relit, texts[1]))
        digests = [sha256(picture) for _, picture, _ in pictures]
        for i, (name, picture, caption) in enumerate(pictures):
            paths = [os.path.relpath(p, relative_to) for p in (picture, folder / mask_file)]
            files_of_row = {"mask_sha256": sha256(folder / mask_file)}
            if len(pictures) == 2:
                files_of_row |= {
                    "relit": os.path.relpath(pictures[1 - i][1], relative_to),
                    "relit_sha256": digests[1 - i],
                }
            facts = (box, label, caption, split, width, height, digests[i], extras | files_of_row)
            rows.append(Row(name, *paths, *facts))
    tell_omissions(f"{folder}: pictures that cannot be decoded, or their masks", omissions)
    return rows


def prepare_backbone(recipe: dict, work: Path) -> Path:
    """Render missing scenes and write ``manifest.jsonl`` of the backbone's training set into ``work / name``.

    Recipe: ``name``, ``dir`` (the bundled studio set, 128 px; null: none), ``count`` (studio scenes to render; beside
    the bundled set those of the train split that follow it), ``size`` of the renders in pixels, ``photos`` (a folder in
    Open Images layout, or null) and ``sources`` (which of its photographs may train weights that are shipped; the test
    split is only for evaluation and may hold any).
    """
    folder = work / recipe["name"]
    sources = [Path(place) for place in (recipe["dir"], recipe["photos"]) if place]
    if missing := [place for place in sources if not place.is_dir()]:
        raise UserError(f"dataset.photos={missing[0]}: no such folder; give one in Open Images layout, or null")
    write_stamps(folder, [place / name for place in sources for name in (*SPLITS, "metadata")])
    if recipe["dir"]:
        options = {"start": 512, "splits": ("train",), "plate": False}
    else:
        options = {"splits": SPLITS}
    renders = generate(folder / "studio", recipe["count"], recipe["size"], **options)
    rows: list[Row] = []
    for split in SPLITS:
        if recipe["dir"]:
            rows += read_rows(Path(recipe["dir"]) / split, split, folder)
        if (renders / split).is_dir():
            rows += read_rows(renders / split, split, folder)
        if recipe["photos"]:
            sources = None if split == "test" else recipe["sources"]
            rows += read_rows(Path(recipe["photos"]) / split, split, folder, sources)
    write_manifest(folder / "manifest.jsonl", rows, recipe["name"])
    return folder / "manifest.jsonl"
