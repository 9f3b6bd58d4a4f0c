"""Preparation of photographs with masks: to a manifest, through a persistent FiftyOne dataset.

select -> (download) -> import -> look at the pixels -> caption -> export. Each step first checks what is already done,
so that the same command resumes after a kill at any point.
"""

import json
import shutil
from functools import cached_property
from pathlib import Path

import lightning

from harmony.core.errors import UserError
from harmony.core.files import write_json
from harmony.data.captions import caption_images, load_captioner
from harmony.data.manifest import write_manifest
from harmony.data.shards import Shards, make_shards, predictor
from harmony.data.sources.decisions import apply_decisions, decisions_file, list_kept, read_decisions
from harmony.data.sources.files import split_folder
from harmony.data.sources.open_images.captions import find_uncaptioned, set_captions
from harmony.data.sources.open_images.database import (
    import_dataset,
    note_work,
    rejections,
    save_views,
    show_decisions,
)
from harmony.data.sources.open_images.layout import Split
from harmony.data.sources.open_images.pixel_facts import look_at_pixels
from harmony.data.sources.open_images.rows import export_rows, write_index
from harmony.data.sources.selection import (
    KEPT,
    Source,
    count_reasons,
    format_counts,
    read_splits,
    reject,
    write_selection,
)
from harmony.data.stamps import write_stamps

CAPTION_BATCH = 16  # images captioned at once
CAPTIONS = 128  # captions in a shard, the most that a killed process loses


def prepare_dataset(
    recipe: dict,
    work: Path,
    source: Source,
    captioner: str | Path | None = None,
    trainer: lightning.Trainer | None = None,
) -> Path:
    """Prepare the dataset that ``recipe`` (datasets/*/recipe.yaml) describes; returns ``work/<name>/manifest.jsonl``.

    ``captioner`` is the backbone's (``<backbone>/captioner``). The recipe may name another BLIP folder or hub id. It is
    loaded only if an image needs a caption. All processes of ``trainer`` write captions (see ``shards.predictor``); the
    first does everything else. Raises UserError for bad input, and if no image is kept.
    """
    recipe = recipe | {"splits": read_splits(recipe["splits"])}
    if recipe["captions"]["captioner"] != "backbone":
        captioner = recipe["captions"]["captioner"]
    folder = Path(work).resolve() / recipe["name"]
    make_shards(Preparation(recipe, folder, source, captioner), trainer or predictor())
    return folder / "manifest.jsonl"


class Preparation(Shards):
    """The preparation: captions in shards, with the other steps before and after them in the first process.

    Only the first process imports FiftyOne. The shards are in ``captions/`` until all captions are in the database.
    Shards of a stopped preparation are used if captioner and photograph are the same.
    """

    def __init__(self, recipe: dict, folder: Path, source: Source, captioner: str | Path | None):
        super().__init__("captions")
        self.recipe, self.folder, self.source, self.captioner = recipe, folder, source, captioner
        self.place = folder / "captions"

    def plan(self) -> tuple[str | None, list[list[str]]]:
        """Select, import, look at the pixels; returns (captioner's name, [id, path, sha256] without a caption)."""
        self.import_selection()
        root, splits = self.selection.root, self.recipe["splits"]
        self.texts = self.source.captions(root, splits)
        photographs = [split for split in splits if not Split(split_folder(root, split)).metadata("scenes.csv")]
        texts = self.texts if self.recipe["captions"]["given"] else {}
        name, rows = find_uncaptioned(self.dataset, texts, self.captioner, photographs)
        captions = self.read_shards(name, {id_: digest for id_, _, digest in rows})
        set_captions(self.dataset, captions, name)
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        return name, [row for row in rows if row[0] not in captions]

    def import_selection(self) -> None:
        """Select, import and look at the pixels; write the selection and print the number of images for each reason."""
        selection, folder = self.source.select(self.recipe, self.folder), self.folder
        ids, splits = selection.rules.image_ids, self.recipe["splits"]
        places = [*self.source.places(selection.root, splits), *([Path(ids)] if isinstance(ids, str) else [])]
        write_stamps(folder, [*places, decisions_file(folder)])  # before a picture is read
        decisions = read_decisions(decisions_file(folder))
        selection = apply_decisions(selection, decisions)
        write_selection(selection, folder)
        for path, number in selection.damage_counts.items():
            print(f"{path}: {number} damaged rows skipped (a value is missing or unreadable, or the line is cut)")
        dataset = import_dataset(self.recipe["name"], selection)
        note_work(dataset, folder)
        look_at_pixels(dataset, selection.rules, folder, list_kept(decisions))
        show_decisions(dataset, decisions)
        save_views(dataset)
        table = reject(selection.table, rejections(dataset))
        write_selection(selection, folder, table)
        print(format_counts(count_reasons(table)), flush=True)
        if KEPT not in table["reason"]:
            raise UserError(f"{selection.root}: no image is kept; {folder / 'selection.csv'} names the reason for each")
        self.dataset, self.selection = dataset, selection

    def read_shards(self, captioner: str | None, digests: dict[str, str]) -> dict[str, str]:
        """Read captions by sample id from shards of a stopped preparation, if captioner and picture are the same."""
        captions = {}
        for file in self.place.glob("*.json"):
            shard = json.loads(file.read_text())
            if shard["captioner"] == captioner:
                captions |= {i: text for i, (digest, text) in shard["captions"].items() if digests.get(i) == digest}
        return captions

    @cached_property
    def model(self) -> tuple:
        """The captioner and its processor, loaded by the first shard."""
        return load_captioner(self.captioner, str(self.device))

    @cached_property
    def parts(self) -> list[list[list[str]]]:
        """The planned photographs of each shard."""
        rows = self.plan_result[1]
        return [rows[i : i + CAPTIONS] for i in range(0, len(rows), CAPTIONS)]

    @property
    def sizes(self) -> list[int]:
        return [len(part) for part in self.parts]

    def file(self, n: int) -> Path:
        """The file of shard ``n``."""
        return self.place / f"{n:05d}.json"

    def is_made(self, n: int) -> bool:
        return False  # ``plan`` lists only missing captions

    def make(self, n: int) -> None:
        batch = [(id_, Path(path)) for id_, path, _ in self.parts[n]]
        digests = {id_: digest for id_, _, digest in self.parts[n]}
        texts = caption_images(batch, *self.model, CAPTION_BATCH, str(self.device))
        captions = {id_: (digests[id_], text) for id_, text in texts}
        write_json(self.file(n), {"captioner": self.plan_result[0], "captions": captions})

    def finish(self) -> None:
        """Write the captions into the database, and the manifest."""
        for n in range(len(self.sizes)):
            shard = json.loads(self.file(n).read_text())
            set_captions(self.dataset, {i: text for i, (_, text) in shard["captions"].items()}, shard["captioner"])
        rows = export_rows(self.dataset, self.folder, self.texts, self.selection)
        write_index(self.folder, rows)
        facts = {"selection": self.selection.digest(), "fiftyone": self.dataset.name}
        write_manifest(self.folder / "manifest.jsonl", rows, self.recipe["name"], **facts)
        shutil.rmtree(self.place)
