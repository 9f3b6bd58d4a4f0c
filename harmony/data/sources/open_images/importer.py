"""The way of a dataset from its folder to the manifest, through a persistent FiftyOne dataset in MongoDB.

select -> (download) -> import -> look at the pixels -> caption -> export. The only file that imports ``fiftyone``, and
never in a training process: simultaneous imports kill each other's database. Each step first asks the dataset what is
done already, so that the same command goes on after a kill at any point.

Fields of a sample
    harmony_id        <split>/<id>, unique                 tags   split, and ``kept`` or ``rejected``
    rejected_because  one of select.REASONS, or None       source where the photograph comes from
    instance          the detection; its mask is a file, cut to the box as FiftyOne wants it
    mask_stored       the whole mask, as it came           row    hash of what the selection said: a change re-imports
    mask_file         the whole mask at the image's size
    sha256, mask_box, mask_area, looked_at                 pixel facts, and the files and rules that they hold for
    caption, caption_model
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path

import cv2
import lightning
import numpy as np
import polars as pl

from harmony.core.errors import UserError
from harmony.core.files import write_json
from harmony.core.row import SPLITS, Row
from harmony.data.captions import GIVEN, caption_images, captioner_name, given_captions, load_captioner
from harmony.data.manifest import write_manifest
from harmony.data.shards import Shards, make_shards, predictor
from harmony.data.sources.files import folder_captions, locate
from harmony.data.sources.folder import select_folder
from harmony.data.sources.open_images.select import (
    KEPT,
    REASONS,
    Rules,
    Selection,
    check_files,
    format_counts,
    reject,
    select,
    write_selection,
)
from harmony.data.sources.studio import generate
from harmony.pixels.images import open_image, sha256, write_image
from harmony.pixels.masks import OBJECT, bounding_box, read_mask

BATCH = 250  # samples written to the database at once
CAPTION_BATCH = 16  # images captioned at once
CAPTIONS = 128  # a shard: the most that a kill can lose of each process
ASPECT_TOLERANCE = 0.02  # Open Images rounds the sizes of masks and photographs independently
STUDIO_FILES = {"plate": "plates/{}.jpg", "relit": "relit/{}.jpg", "shadow": "shadows/{}.png"}
ZOO_FOLDER = "open-images-v7"


# --- the whole way


def prepare_dataset(
    recipe: dict,
    work: Path,
    captioner: str | Path | None = None,
    trainer: lightning.Trainer | None = None,
) -> Path:
    """Prepare the dataset that ``recipe`` (datasets/*/recipe.yaml) describes; returns ``work/<name>/manifest.jsonl``.

    ``captioner`` is the kit's (``<kit>/captioner``), used unless the recipe names another BLIP folder or hub id, and
    loaded only if some image needs it. Captions are made by all processes of ``trainer`` (see ``shards.predictor``),
    everything else by the first. Raises UserError for bad input, and when nothing is left.
    """
    if recipe["captions"]["captioner"] != "kit":
        captioner = recipe["captions"]["captioner"]
    folder = Path(work).resolve() / recipe["name"]
    make_shards(Preparation(recipe, folder, captioner), trainer or predictor())
    return folder / "manifest.jsonl"


class Preparation(Shards):
    """Captions in shards; what comes before and behind them is done by the first process, which alone knows FiftyOne.

    The shards lie in ``captions/`` until all captions are in the database. What a preparation that was stopped left
    there is taken over, as long as captioner and photograph are the same.
    """

    def __init__(self, recipe: dict, folder: Path, captioner: str | Path | None):
        super().__init__("captions")
        self.recipe, self.folder, self.captioner = recipe, folder, captioner
        self.place = folder / "captions"

    def plan(self) -> tuple[str | None, list[list[str]]]:
        """Select, import, look at the pixels: (captioner's name, [sample id, path, sha256] of what lacks a caption)."""
        recipe, folder = self.recipe, self.folder
        selection = select_recipe(recipe, folder)
        write_selection(selection, folder)
        for path, number in selection.skipped.items():
            print(f"{path}: {number} damaged rows skipped (a value is missing or unreadable, or the line is cut)")
        dataset = import_dataset(recipe["name"], selection, folder)
        look_at_pixels(dataset, selection.rules, folder)
        save_views(dataset)
        table = reject(selection.table, rejections(dataset))
        print(format_counts(write_counts(selection, table, folder)), flush=True)
        if KEPT not in table["reason"]:
            raise UserError(f"{selection.root}: no image is kept; {folder / 'selection.csv'} names the reason for each")
        given = read_given(recipe, selection)
        self.dataset, self.selection, self.given = dataset, selection, given
        name, todo = uncaptioned(dataset, given if recipe["captions"]["given"] else {}, self.captioner)
        wanted = {id_: digest for id_, _, digest in todo}
        left = {}
        for file in self.place.glob("*.json"):
            shard = json.loads(file.read_text())
            if shard["captioner"] == name:
                left |= {i: text for i, (digest, text) in shard["captions"].items() if wanted.get(i) == digest}
        set_captions(dataset, left, name)
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        return name, [row for row in todo if row[0] not in left]

    @cached_property
    def model(self) -> tuple:
        return load_captioner(self.captioner, str(self.device))

    @cached_property
    def parts(self) -> list[list[list[str]]]:
        listed = self.planned[1]
        return [listed[i : i + CAPTIONS] for i in range(0, len(listed), CAPTIONS)]

    @property
    def sizes(self) -> list[int]:
        return [len(part) for part in self.parts]

    def file(self, n: int) -> Path:
        return self.place / f"{n:05d}.json"

    def is_made(self, n: int) -> bool:
        return False  # ``plan`` lists only what is missing

    def make(self, n: int) -> None:
        batch = [(id_, Path(path)) for id_, path, _ in self.parts[n]]
        digests = {id_: digest for id_, _, digest in self.parts[n]}
        said = caption_images(batch, *self.model, CAPTION_BATCH, str(self.device))
        captions = {id_: (digests[id_], text) for id_, text in said}
        write_json(self.file(n), {"captioner": self.planned[0], "captions": captions})

    def finish(self) -> None:
        """The captions into the database, and the manifest."""
        for n in range(len(self.sizes)):
            shard = json.loads(self.file(n).read_text())
            set_captions(self.dataset, {i: text for i, (_, text) in shard["captions"].items()}, shard["captioner"])
        rows = export_rows(self.dataset, self.folder, self.given)
        facts = {"selection": self.selection.digest(), "fiftyone": self.dataset.name}
        write_manifest(self.folder / "manifest.jsonl", rows, self.recipe["name"], **facts)
        shutil.rmtree(self.place)


def select_recipe(recipe: dict, folder: Path) -> Selection:
    """The selection of a recipe; downloads Open Images first where the recipe names no folder, and renders what it
    counts.
    """
    rules = Rules(**recipe["select"])
    if recipe.get("count"):
        recipe = recipe | {"dir": str(generate(folder / f"renders-{recipe['count']}", recipe["count"]))}
    if recipe["layout"] == "folder":
        return select_folder(locate(recipe), recipe["splits"], rules)
    if recipe["dir"] is None and "download" in recipe:
        return download(recipe["splits"], rules, folder, recipe["download"]["examples"])
    return select(locate(recipe), recipe["splits"], rules)


def read_given(recipe: dict, selection: Selection) -> dict[str, list[str]]:
    """Captions that came with the dataset: {<split>/<id>: [caption, ...]}."""
    if recipe["layout"] != "folder":
        by_split = {split: given_captions(selection.root / split) for split in recipe["splits"]}
    elif (selection.root / "images").is_dir():
        by_split = dict.fromkeys(recipe["splits"], folder_captions(selection.root))
    else:
        by_split = {split: folder_captions(selection.root / split) for split in recipe["splits"]}
    return {f"{split}/{id_}": texts for split, captions in by_split.items() for id_, texts in captions.items()}


def write_counts(selection: Selection, table: pl.DataFrame, folder: Path) -> dict[str, dict[str, int]]:
    """Write the selection with the reasons found in the pixels; returns the counts."""
    _, summary = write_selection(selection, folder, table)
    return json.loads(summary.read_text())["counts"]


# --- FiftyOne


def load_fiftyone():  # noqa: ANN201  the module itself
    """``fiftyone``, with its database answering. Raises UserError when there is no server."""
    os.environ.setdefault("FIFTYONE_DO_NOT_TRACK", "1")
    os.environ.setdefault("FIFTYONE_DATABASE_VALIDATION", "false")  # else a note at each start that 6.0 is the oldest
    os.environ.setdefault("FIFTYONE_SHOW_PROGRESS_BARS", "false")
    mend = "python -m harmony.doctor tells what is missing"
    try:
        import fiftyone
        from fiftyone.core.service import ServiceException
    except ImportError as error:
        raise UserError(f"FiftyOne cannot be imported ({error}); {mend}") from None
    try:
        fiftyone.list_datasets()
    except (ServiceException, ConnectionError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"FiftyOne's database did not start ({reason}) in {fiftyone.config.database_dir}; {mend}"
        ) from None
    return fiftyone


def dataset_name(name: str, root: Path) -> str:
    """The FiftyOne name of dataset ``name`` in ``root``: itself, or with a hash where another folder has taken it."""
    fo = load_fiftyone()
    if not fo.dataset_exists(name):
        return name
    owner = fo.load_dataset(name).info.get("root")
    return name if owner in (None, str(root)) else f"{name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"


def open_dataset(name: str, root: Path):  # noqa: ANN201  fiftyone.Dataset
    """The persistent dataset, created with its fields and its unique index if need be."""
    fo = load_fiftyone()
    name = dataset_name(name, root)
    dataset = fo.load_dataset(name) if fo.dataset_exists(name) else fo.Dataset(name, persistent=True)
    if dataset.info.get("root") is None:
        dataset.info["root"] = str(root)
        dataset.save()
    declare_fields(dataset)
    return dataset


def declare_fields(dataset) -> None:
    """Name every field once, so that batches need not be searched for new ones."""
    import fiftyone as fo

    texts = ("harmony_id", "rejected_because", "source", "mask_stored", "mask_file", "row", "sha256", "looked_at")
    fields = dict.fromkeys((*texts, "caption", "caption_model"), {"ftype": fo.StringField})
    fields["mask_box"] = {"ftype": fo.ListField, "subfield": fo.FloatField}
    fields["mask_area"] = {"ftype": fo.FloatField}
    fields["instance"] = {"ftype": fo.EmbeddedDocumentField, "embedded_doc_type": fo.Detection}
    for field, kind in fields.items():
        if not dataset.has_sample_field(field):
            dataset.add_sample_field(field, **kind)
    if "harmony_id" not in dataset.list_indexes():
        dataset.create_index("harmony_id", unique=True)


def import_dataset(name: str, selection: Selection, work: Path):  # noqa: ANN201  fiftyone.Dataset
    """Bring the dataset's samples in line with the selection: kept ones with their mask, rejected ones without.

    Only what differs is touched: a sample whose selection row is unchanged stays with all that was learnt about it.
    Rejected images without a file (not downloaded) are left out. Nothing is doubled, however often this is killed.
    """
    dataset = open_dataset(name, selection.root)
    digest = selection.digest()
    if dataset.info.get("selection") != digest:
        synchronise(dataset, selection, work)
        dataset.info["selection"] = digest
        dataset.save()
    restore_masks(dataset, work)
    return dataset


def synchronise(dataset, selection: Selection, work: Path) -> None:
    """Delete the samples that the selection no longer holds in this form, add those that are missing."""
    wanted = {row["key"]: row for row in selection_rows(selection)}
    ids, present, rows = dataset.values(["id", "harmony_id", "row"])
    agrees = (key in wanted and wanted[key]["row"] == row for key, row in zip(present, rows, strict=True))
    stale = [i for i, good in zip(ids, agrees, strict=True) if not good]
    if stale:
        print(f"{dataset.name}: {len(stale)} samples no longer agree with the selection and are replaced", flush=True)
        dataset.delete_samples(stale)
    missing = set(wanted) - set(dataset.values("harmony_id"))
    add_rows(dataset, [wanted[key] for key in wanted if key in missing], work)


def restore_masks(dataset, work: Path) -> None:
    """Cut the masks anew that have left the work folder."""
    fields = {"id": "id", "key": "harmony_id", "mask": "mask_stored", "box": "instance.bounding_box"}
    paths = dataset.match_tags("kept").values([*fields.values(), "instance.mask_path"])
    lost = [dict(zip(fields, v, strict=False)) for v in zip(*paths, strict=True) if v[-1] and not os.path.isfile(v[-1])]
    make_folders(work, "instances")
    cut = {row["id"]: cut_instance(row["key"], row["mask"], row["box"], work) for row in lost}
    if cut:
        dataset.set_values("instance.mask_path", cut, key_field="id")


def selection_rows(selection: Selection) -> Iterator[dict]:
    """The selection's rows that have something to show, with absolute paths, their key and their hash."""
    for row in selection.table.iter_rows(named=True):
        row["row"] = hashlib.sha256(json.dumps(list(row.values())).encode()).hexdigest()[:16]
        row["key"] = f"{row['split']}/{row['id']}"
        row["image"] = str(selection.root / row["image"])
        row["mask"] = None if row["mask"] is None else str(selection.root / row["mask"])
        if row["reason"] in (KEPT, "image file missing") or os.path.isfile(row["image"]):
            yield row


def add_rows(dataset, rows: list[dict], work: Path) -> None:
    """Add samples in batches, the masks cut by threads meanwhile."""
    make_folders(work, "instances")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        masks = pool.map(lambda row: cut_row(row, work), rows)  # goes on while batches are written
        for batch in progress(rows, BATCH, f"import into FiftyOne dataset {dataset.name}"):
            samples = [make_sample(row, mask) for row, mask in zip(batch, masks, strict=False)]
            dataset.add_samples(samples, expand_schema=False, validate=False, progress=False)


def make_folders(work: Path, kind: str) -> None:
    for split in SPLITS:
        (work / kind / split).mkdir(parents=True, exist_ok=True)


def box_xywh(row: dict) -> list[float]:
    """The box of a selection row as FiftyOne writes it: x, y, width, height in fractions of the image."""
    return [row["x0"], row["y0"], row["x1"] - row["x0"], row["y1"] - row["y0"]]


def cut_row(row: dict, work: Path) -> str | None:
    return cut_instance(row["key"], row["mask"], box_xywh(row), work) if row["reason"] == KEPT else None


def cut_instance(key: str, mask_path: str, box: list[float], work: Path) -> str | None:
    """Write the mask cut to its box, as FiftyOne wants it; None for one that cannot be cut (its reason comes later)."""
    mask = cv2.imread(mask_path, cv2.IMREAD_GRAYSCALE)
    if mask is None:
        return None
    height, width = mask.shape
    x, y, w, h = box
    cut = mask[round(y * height) : round((y + h) * height), round(x * width) : round((x + w) * width)]
    if not cut.size:
        return None
    path = work / "instances" / f"{key}.png"
    partial = path.with_suffix(".part.png")
    bits = (cut > OBJECT).astype(np.uint8) * 255
    cv2.imwrite(str(partial), bits, [cv2.IMWRITE_PNG_BILEVEL, 1])  # 1 bit a pixel: several times as quick as 8
    os.replace(partial, path)
    return str(path)


def make_sample(row: dict, mask_path: str | None):  # noqa: ANN201  fiftyone.Sample
    """One sample, kept or rejected."""
    import fiftyone as fo

    kept = row["reason"] == KEPT
    instance = None
    if row["x0"] is not None:
        instance = fo.Detection(label=row["label"], bounding_box=box_xywh(row), mask_path=mask_path)
    return fo.Sample(
        filepath=row["image"],
        tags=[row["split"], "kept" if kept else "rejected"],
        harmony_id=row["key"],
        rejected_because=None if kept else row["reason"],
        instance=instance,
        mask_stored=row["mask"],
        source=row["source"],
        row=row["row"],
    )


def save_views(dataset) -> None:
    """Saved views ``kept``, ``rejected`` and one a reason; those of reasons that no longer occur are removed."""
    from fiftyone import ViewField as F

    reasons = [r for r in dataset.distinct("rejected_because") if r is not None]
    views = {"kept": dataset.match_tags("kept"), "rejected": dataset.match_tags("rejected")}
    views |= {f"rejected: {r}": dataset.match(F("rejected_because") == r) for r in reasons}
    for name in dataset.list_saved_views():
        if name.startswith("rejected: ") and name not in views:
            dataset.delete_saved_view(name)
    for name, view in views.items():
        dataset.save_view(name, view, overwrite=True)


def browse(recipe: dict, port: int, address: str | None) -> None:
    """Serve the FiftyOne App for a prepared dataset until interrupted. Raises UserError for an unknown dataset."""
    fo = load_fiftyone()
    name = recipe["name"] if recipe["dir"] is None else dataset_name(recipe["name"], locate(recipe))
    if not fo.dataset_exists(name):
        known = ", ".join(fo.list_datasets()) or "none yet"
        raise UserError(f"FiftyOne has no dataset {name} (it has: {known}); run harmony.prepare first")
    dataset = fo.load_dataset(name)
    print(f"{name}: {dataset.count_sample_tags()}; saved views: {', '.join(dataset.list_saved_views())}", flush=True)
    session = fo.launch_app(dataset, remote=True, port=port, address=address)
    print(f"{session.url}\nCtrl-C ends it.", flush=True)
    session.wait(-1)


# --- pixels


def look_at_pixels(dataset, rules: Rules, work: Path) -> None:
    """Decode every kept image and mask that is new or has changed; store the facts, or reject with the reason."""
    import fiftyone as fo

    pending = changed_samples(dataset, rules)
    make_folders(work, "masks")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in progress(pending, BATCH, "look at the pixels"):
            facts = list(pool.map(lambda sample: pixel_facts(sample, rules, work), batch))
            by_id = {sample["id"]: found for sample, found in zip(batch, facts, strict=True)}
            split_of = {sample["id"]: sample["key"].split("/")[0] for sample in batch}
            good = {i: f for i, f in by_id.items() if "reason" not in f}
            before = {sample["id"]: sample["sha256"] for sample in batch}
            other = {i: None for i, f in good.items() if before[i] not in (None, f["sha256"])}
            dataset.set_values("caption_model", other, key_field="id")  # the caption was that of another picture
            bad = {i: f["reason"] for i, f in by_id.items() if "reason" in f}
            size = {i: fo.ImageMetadata(width=f["width"], height=f["height"]) for i, f in good.items()}
            dataset.set_values("metadata", size, key_field="id")
            for field in ("sha256", "mask_file", "mask_box", "mask_area"):
                dataset.set_values(field, {i: f[field] for i, f in good.items()}, key_field="id")
            dataset.set_values("rejected_because", {i: bad.get(i) for i in by_id}, key_field="id")
            tags = {i: [split_of[i], "rejected" if i in bad else "kept"] for i in by_id}
            dataset.set_values("tags", tags, key_field="id")
            # last, because it says that the rest is there
            dataset.set_values("looked_at", {s["id"]: s["stamp"] for s in batch}, key_field="id")


def changed_samples(dataset, rules: Rules) -> list[dict]:
    """Samples kept by the selection whose files or area limits are not those of ``looked_at``."""
    from fiftyone import ViewField as F

    by_pixels = REASONS[REASONS.index("image undecodable") :]
    view = dataset.match(~F("rejected_because").exists() | F("rejected_because").is_in(by_pixels))
    names = {"id": "id", "key": "harmony_id", "image": "filepath", "mask": "mask_stored", "looked_at": "looked_at"}
    names |= {"mask_file": "mask_file", "sha256": "sha256"}
    rows = [dict(zip(names, values, strict=True)) for values in zip(*view.values(list(names.values())), strict=True)]
    for row in rows:
        row["stamp"] = stamp(rules, row["image"], row["mask"])
    return [r for r in rows if r["stamp"] != r["looked_at"] or (r["mask_file"] and not os.path.isfile(r["mask_file"]))]


def stamp(rules: Rules, *paths: str) -> str:
    """Area limits, sizes and times of files: changes when one of them does."""
    stats = (os.stat(p) if os.path.exists(p) else None for p in paths)
    files = ("-" if s is None else f"{s.st_size}.{s.st_mtime_ns}" for s in stats)
    return f"{rules.min_area}-{rules.max_area} {' '.join(files)}"


def pixel_facts(sample: dict, rules: Rules, work: Path) -> dict:
    """Size, hash, box and area (fraction of the image) of one instance, or ``{"reason": ...}``.

    A mask of another size but the same shape is brought to the image's size and kept in the work folder.
    """
    try:
        width, height = open_image(sample["image"]).size
    except UserError:
        return {"reason": "image undecodable"}
    path = sample["mask"]
    try:
        stored = open_image(path, "mask").size
    except UserError:
        return {"reason": "mask undecodable"}
    if abs(stored[0] * height - stored[1] * width) > ASPECT_TOLERANCE * stored[1] * width:
        return {"reason": "mask shape differs"}
    try:
        mask = read_mask(path, (width, height), resize=True)
    except UserError:
        return {"reason": "mask empty"}
    area = float(mask.mean())
    if not rules.min_area <= area <= rules.max_area:
        return {"reason": "mask area too small" if area < rules.min_area else "mask area too large"}
    if stored != (width, height):
        path = work / "masks" / f"{sample['key']}.png"
        write_image(path, mask)
    facts = {"width": width, "height": height, "sha256": sha256(sample["image"]), "mask_file": str(path)}
    return facts | {"mask_area": area, "mask_box": [float(v) for v in bounding_box(mask)]}


def rejections(dataset) -> dict[str, str]:
    """{<split>/<id>: reason} of the rejected samples."""
    view = dataset.match_tags("rejected")
    return dict(zip(*view.values(["harmony_id", "rejected_because"]), strict=True))


# --- captions


def uncaptioned(
    dataset, given: dict[str, list[str]], captioner: str | Path | None
) -> tuple[str | None, list[list[str]]]:
    """(the captioner's name, [sample id, path, sha256] of each kept photograph that it has to look at).

    Given captions are written at once, the first of each; what is there already stays. UserError without a captioner
    where one is needed.
    """
    fields = ("id", "harmony_id", "filepath", "sha256", "caption", "caption_model")
    kept = list(zip(*dataset.match_tags("kept").values(list(fields)), strict=True))
    firsts = {i: (given[key][0], (text, model)) for i, key, _, _, text, model in kept if key in given}
    set_captions(dataset, {i: t for i, (t, present) in firsts.items() if present != (t, GIVEN)}, GIVEN)
    unnamed = [(i, path, digest, model) for i, key, path, digest, _, model in kept if key not in given]
    if not unnamed:
        return None, []
    if captioner is None:
        raise UserError(f"{dataset.name}: {len(unnamed)} images lack a caption; give a kit that has a captioner")
    name = captioner_name(captioner)
    return name, [[i, path, digest] for i, path, digest, model in unnamed if model != name]


def set_captions(dataset, captions: dict[str, str], model: str) -> None:
    """Write captions on samples by sample id, the model's name last, because it says that the caption is there."""
    if captions:
        dataset.set_values("caption", captions, key_field="id")
        dataset.set_values("caption_model", dict.fromkeys(captions, model), key_field="id")


# --- the manifest


def export_rows(dataset, base: Path, given: dict[str, list[str]]) -> list[Row]:
    """The kept samples as rows, paths relative to ``base``. Plates, relit images and shadows go to ``extras``."""
    fields = ("harmony_id", "filepath", "mask_file", "mask_box", "instance.label", "caption", "caption_model")
    fields += ("metadata.width", "metadata.height", "sha256")
    root = Path(dataset.info["root"])
    return [
        Row(
            id=key.split("/", 1)[1],
            image=os.path.relpath(image, base),
            mask=os.path.relpath(mask, base),
            box=tuple(box),
            label=label,
            caption=caption,
            split=key.split("/", 1)[0],
            width=width,
            height=height,
            sha256=digest,
            extras={"caption_source": model, **studio_extras(root, key, base, given)},
        )
        for key, image, mask, box, label, caption, model, width, height, digest in zip(
            *dataset.match_tags("kept").values(list(fields)), strict=True
        )
    ]


def studio_extras(root: Path, key: str, base: Path, given: dict[str, list[str]]) -> dict[str, str]:
    """Paths of the ground truth that only rendered scenes have, and the caption of the object under the other light."""
    split, id_ = key.split("/", 1)
    files = {name: root / split / pattern.format(id_) for name, pattern in STUDIO_FILES.items()}
    extras = {name: os.path.relpath(path, base) for name, path in files.items() if path.is_file()}
    if "relit" in extras and len(given.get(key, ())) > 1:
        extras["relit_caption"] = given[key][1]
    return extras


# --- download of the real Open Images


def download(splits: Iterable[str], rules: Rules, work: Path, examples: int) -> Selection:
    """Fetch Open Images V7 into FiftyOne's zoo folder: annotations, then only the images and masks that are selected.

    ``examples`` rejected images per split and reason come too, so that each reason can be looked at. Masks are
    published as 16 archives a split, by the first digit of the id. Raises UserError when the network is not there.
    """
    root = Path(load_fiftyone().config.dataset_zoo_dir) / ZOO_FOLDER
    for split in splits:
        fetch(root, split, [], work)
    selection = select(root, list(splits), rules, files=False)
    for split in splits:
        table = selection.table.filter(pl.col("split") == split)
        shown = table.filter(pl.col("reason") != KEPT).group_by("reason", maintain_order=True).head(examples)
        fetch(root, split, [*table.filter(pl.col("reason") == KEPT)["id"], *shown["id"]], work)
    return Selection(root, check_files(selection.table, root), rules, selection.skipped)


def fetch(root: Path, split: str, ids: list[str], work: Path) -> None:
    """Annotations, images and mask archives of ``ids``, through FiftyOne. What is there is not fetched again."""
    import fiftyone.utils.openimages as fouo

    id_file = write_id_file(work / f"{split}_ids.txt", split, ids)
    forget_interrupted(root / split)
    what = f"images and masks of {len(ids)} photographs" if ids else "annotations"
    print(f"Open Images {split}: {what} into {root / split}", flush=True)
    try:
        fouo.download_open_images_split(
            str(root / split), split, "v7", label_types=["detections", "segmentations"], image_ids=str(id_file)
        )
    except Exception as error:  # whatever the network, the disk or the libraries between them raise
        raise UserError(
            f"Open Images {split}: download failed ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
            "check the network and run the same command again, or set dataset.dir to a folder that holds the dataset"
        ) from error
    (root / split / ".fetching").unlink(missing_ok=True)


def write_id_file(path: Path, split: str, ids: Iterable[str]) -> Path:
    """One ``<split>/<id>`` a line, the form in which FiftyOne takes image ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text("".join(f"{split}/{id_}\n" for id_ in ids))
    os.replace(partial, path)
    return path


def forget_interrupted(folder: Path) -> None:
    """Remove what an interrupted download may have left half written, and begin the record of the next one.

    FiftyOne writes CSVs and archives in place and takes any file that it finds for complete. ``.fetching`` lists what
    was there before. Images are excepted: each is renamed into place when it is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / ".fetching"
    if record.is_file():
        before = set(json.loads(record.read_text()))
        for path in fetched_parts(folder):
            if str(path.relative_to(folder)) not in before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    partial = record.with_name(".fetching.part")
    partial.write_text(json.dumps([str(p.relative_to(folder)) for p in fetched_parts(folder)]))
    os.replace(partial, record)


def fetched_parts(folder: Path) -> list[Path]:
    """What is fetched as one: each CSV, each mask archive and each folder that such an archive is unpacked into."""
    places = (folder / "metadata", folder / "labels", folder / "labels" / "masks")
    return [p for place in places for p in place.glob("*") if p != places[-1]]


# --- progress


def progress(items: list, size: int, what: str, say: Callable[[str], None] | None = None) -> Iterator[list]:
    """Batches of ``items``; says how far it is and how fast, every few seconds and at the end."""
    say = say or (lambda line: print(line, flush=True))
    start = last = time.monotonic()
    done, remaining = 0, iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
        done += len(batch)
        now = time.monotonic()
        if now - last > 5 or done == len(items):
            last = now
            say(f"{what}: {done}/{len(items)}, {done / max(now - start, 1e-9):.0f} a second")
