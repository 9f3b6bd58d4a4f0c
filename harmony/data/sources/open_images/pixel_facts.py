"""Facts from the pixels of an image and its mask: whether they decode, their size, hash, box and area."""

import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from harmony.core.errors import UserError
from harmony.core.foreign import path_inside
from harmony.data.sources.open_images.batches import batches
from harmony.data.sources.open_images.database import load_fiftyone
from harmony.data.sources.selection import KEPT, REASONS, Rules, area_reason
from harmony.pixels.images import open_image, sha256, write_image
from harmony.pixels.masks import EmptyMaskError, bounding_box, read_mask

if TYPE_CHECKING:
    from harmony.data.sources.open_images.database import Dataset

ASPECT_TOLERANCE = 0.02  # Open Images rounds the sizes of masks and photographs independently


def look_at_pixels(dataset: "Dataset", rules: Rules, work: Path, kept_keys: Collection[str] = ()) -> None:
    """Decode every kept image and mask that is new or has changed; store the facts, or reject with a reason.

    The masks of ``kept_keys``, which are kept by hand, may have any area.
    """
    fo, samples = load_fiftyone(), find_changed_samples(dataset, rules, kept_keys)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in batches(samples, "look at the pixels"):
            facts = list(pool.map(lambda sample: pixel_facts(sample, sample["rules"], work), batch))
            results = {sample["id"]: fact for sample, fact in zip(batch, facts, strict=True)}
            split_of = {sample["id"]: sample["key"].split("/")[0] for sample in batch}
            facts_by_id = {i: f for i, f in results.items() if "reason" not in f}
            hashes = {sample["id"]: sample["sha256"] for sample in batch}
            shown_paths = {sample["id"]: sample["shown"] for sample in batch}
            changed_paths = {i: f["shown"] for i, f in facts_by_id.items() if shown_paths[i] not in (None, f["shown"])}
            dataset.set_values("mask.mask_path", changed_paths, key_field="id")
            resets = {i: None for i, f in facts_by_id.items() if hashes[i] not in (None, f["sha256"])}
            dataset.set_values("caption_model", resets, key_field="id")  # the caption belongs to the old picture
            reasons = {i: f["reason"] for i, f in results.items() if "reason" in f}
            sizes = {i: fo.ImageMetadata(width=f["width"], height=f["height"]) for i, f in facts_by_id.items()}
            dataset.set_values("metadata", sizes, key_field="id")
            for field in ("sha256", "mask_sha256", "mask_file", "mask_box", "mask_area"):
                dataset.set_values(field, {i: f[field] for i, f in facts_by_id.items()}, key_field="id")
            dataset.set_values("rejected_because", {i: reasons.get(i) for i in results}, key_field="id")
            tags = {i: [split_of[i], "rejected" if i in reasons else "kept"] for i in results}
            dataset.set_values("tags", tags, key_field="id")
            # last, because it marks the sample as complete
            dataset.set_values("looked_at", {s["id"]: s["stamp"] for s in batch}, key_field="id")


def find_changed_samples(dataset: "Dataset", rules: Rules, kept_keys: Collection[str] = ()) -> list[dict]:
    """The samples that the selection keeps and whose files or area limits differ from ``looked_at``."""
    any_area = replace(rules, min_area=0, max_area=1)
    F, pixel_reasons = load_fiftyone().ViewField, REASONS[REASONS.index("image undecodable") :]
    view = dataset.match(~F("rejected_because").exists() | F("rejected_because").is_in(pixel_reasons))
    names = {"id": "id", "key": "harmony_id", "image": "filepath", "mask": "mask_stored", "looked_at": "looked_at"}
    names |= {"mask_file": "mask_file", "mask_sha256": "mask_sha256", "sha256": "sha256", "shown": "mask.mask_path"}
    rows = [dict(zip(names, values, strict=True)) for values in zip(*view.values(list(names.values())), strict=True)]
    for row in rows:
        row["rules"] = any_area if row["key"] in kept_keys else rules
        row["stamp"] = stamp(row["rules"], row["image"], row["mask"])
    return [
        row
        for row in rows
        if row["stamp"] != row["looked_at"]
        or (row["mask_file"] and not (row["mask_sha256"] and os.path.isfile(row["mask_file"])))
        or (row["shown"] and not os.path.isfile(row["shown"]))
    ]


def stamp(rules: Rules, *paths: str) -> str:
    """A text of area limits, sizes and times of files, which changes when one of them changes."""
    stats = (os.stat(p) if os.path.exists(p) else None for p in paths)
    files = ("-" if s is None else f"{s.st_size}.{s.st_mtime_ns}" for s in stats)
    return f"{rules.min_area}-{rules.max_area} {' '.join(files)}"


def pixel_facts(sample: dict, rules: Rules, work: Path) -> dict:
    """Size, hash, box and area (fraction of the image) of one instance, or ``{"reason": ...}``.

    A mask of another size but the same aspect is resized to the image's size and kept in the work folder. ``shown`` is
    the mask for the App: a copy, too, where the App would read the file otherwise than we do.
    """
    try:
        width, height = open_image(sample["image"]).size
    except UserError:
        return {"reason": "image undecodable"}
    path = sample["mask"]
    try:
        image = open_image(path, "mask")
    except UserError:
        return {"reason": "mask undecodable"}
    if abs(image.width * height - image.height * width) > ASPECT_TOLERANCE * image.height * width:
        return {"reason": "mask shape differs"}
    try:
        mask = read_mask(path, (width, height), resize=True)
    except UserError as error:
        return {"reason": "mask empty" if isinstance(error, EmptyMaskError) else "mask undecodable"}
    area = float(mask.mean())
    if (reason := area_reason(area, rules)) != KEPT:
        return {"reason": reason}
    has_size, shown = image.size == (width, height), path
    if not (has_size and is_gray_png(path, image)):
        shown = str(path_inside(work / "masks", f"{sample['key']}.png"))
        write_image(shown, mask)
    path = path if has_size else shown
    facts = {"width": width, "height": height, "sha256": sha256(sample["image"]), "mask_file": str(path)}
    facts |= {"mask_sha256": sha256(path), "shown": shown}
    return facts | {"mask_area": area, "mask_box": [float(v) for v in bounding_box(mask)]}


def is_gray_png(path: str, image: Image.Image) -> bool:
    """Whether a decoded mask comes from a PNG with nothing but gray: others are read in another way by the App."""
    return Path(path).suffix.lower() == ".png" and image.mode in ("1", "L") and not image.has_transparency_data
