"""From a dataset's recipe to its manifest, whatever the recipe's layout; once for each recipe."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import lightning
from filelock import FileLock

from harmony.core.files import write_json
from harmony.core.signals import deaf_children, end_with
from harmony.data.captions import BLIP
from harmony.data.shards import predictor
from harmony.data.sources import editing
from harmony.data.sources.open_images.importer import locate, prepare_dataset
from harmony.data.sources.pixels import prepare_kit
from harmony.models.backbone import kit_path


def prepare(recipe: dict, kit: str, work: str, trainer: lightning.Trainer | None = None) -> Path:
    """Prepare the dataset of a recipe under ``work``; returns the manifest (or see ``as_it_is``).

    ``kit`` is where the captioner lies; it runs in all processes of ``trainer`` (see ``shards.predictor``).
    """
    if found := as_it_is(recipe, work):
        return found
    trainer, folder = trainer or predictor(), Path(work).resolve() / recipe["name"]
    if trainer.is_global_zero:
        (folder / "recipe.json").unlink(missing_ok=True)  # nothing is prepared until all is done
    if recipe["layout"] != "kit":
        captioner = Path(kit_path(kit)) / "captioner"
        prepare_dataset(recipe, folder.parent, captioner if captioner.is_dir() else BLIP, trainer)
    elif trainer.is_global_zero:
        prepare_kit(recipe | {"dir": locate(recipe)}, folder.parent)
    if trainer.is_global_zero:
        write_json(folder / "recipe.json", recipe)
    return folder / "manifest.jsonl"


def as_it_is(recipe: dict, work: str) -> Path | None:
    """What a dataset without masks is read from, with no manifest between: its folder, or its list of edits.

    None for a dataset that is prepared.
    """
    if recipe["layout"] == "pictures":
        return locate(recipe)
    if recipe["layout"] != "editing":
        return None
    if not recipe["count"]:
        return locate(recipe) / "edits.jsonl"
    folder = Path(work).resolve() / recipe["name"] / f"renders-{recipe['count']}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".rendering"):  # of several processes one renders
        return editing.generate(folder, recipe["count"]) / "edits.jsonl"


def ensure(recipe: dict, kit: str, work: str) -> Path:
    """Prepare unless the same recipe has been prepared already.

    In a process of its own, which ends with its database: training processes must never import FiftyOne. Of several
    processes that ask at once (ranks, or two commands) one prepares and the others wait for it.
    """
    folder = Path(work).resolve() / recipe["name"]
    manifest = folder / "manifest.jsonl"
    if found := as_it_is(recipe, work):
        return found
    if is_prepared(folder, recipe):
        return manifest
    with lock(folder):
        if is_prepared(folder, recipe):  # while this process waited
            return manifest
        context, here = get_context("spawn"), os.getpid()
        with ProcessPoolExecutor(1, mp_context=context, initializer=end_with, initargs=(here,)) as process:
            with deaf_children():
                manifest = process.submit(prepare, recipe, kit, work)
            try:
                return manifest.result()
            except KeyboardInterrupt:
                for worker in process._processes.values():  # ``kill_workers`` of Python 3.14
                    worker.kill()
                raise


def lock(folder: Path) -> FileLock:
    """Held by the process that prepares ``folder``; the system lets go of it when its holder dies."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".preparing")


def is_prepared(folder: Path, recipe: dict) -> bool:
    """Whether ``folder`` holds the manifest of exactly this recipe."""
    done = folder / "recipe.json"
    return (folder / "manifest.jsonl").exists() and done.exists() and json.loads(done.read_text()) == recipe
