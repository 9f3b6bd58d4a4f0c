"""From a dataset's recipe to its manifest, whatever the recipe's layout; once for each recipe."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import lightning
from filelock import FileLock

from harmony.core.errors import UserError
from harmony.core.files import write_json
from harmony.core.signals import end_with, ignore_ctrl_c_in_children
from harmony.data.captions import BLIP
from harmony.data.shards import predictor
from harmony.data.sources.files import locate
from harmony.models.backbone import backbone_path


class Layout(NamedTuple):
    """How a dataset in one layout is prepared: ``prepare(recipe, work, backbone, trainer)``.

    With ``manifest`` it writes ``work/<name>/manifest.jsonl``, and all processes of ``trainer`` call it. Without, the
    dataset has no masks and is read as it is: it returns the file or folder to read.
    """

    prepare: Callable[[dict, Path, str, lightning.Trainer | None], Path]
    manifest: bool = True


# These functions import what they need: a prepared dataset needs neither polars nor FiftyOne.


def prepare_open_images(recipe: dict, work: Path, backbone: str, trainer: lightning.Trainer) -> Path:
    """Photographs or renders in Open Images layout."""
    from harmony.data.sources.open_images.preparation import prepare_dataset
    from harmony.data.sources.open_images.source import OPEN_IMAGES

    return prepare_dataset(recipe, work, OPEN_IMAGES, captioner(backbone), trainer)


def prepare_folder(recipe: dict, work: Path, backbone: str, trainer: lightning.Trainer) -> Path:
    """A user's own photographs and masks."""
    from harmony.data.sources.folder import FOLDER
    from harmony.data.sources.open_images.preparation import prepare_dataset

    return prepare_dataset(recipe, work, FOLDER, captioner(backbone), trainer)


def prepare_pixels(recipe: dict, work: Path, backbone: str, trainer: lightning.Trainer) -> Path:
    """The pixels that a backbone is trained on."""
    if trainer.is_global_zero:
        from harmony.data.sources.pixels import prepare_backbone

        prepare_backbone(recipe | {"dir": locate(recipe)}, work)
    return work / recipe["name"] / "manifest.jsonl"


def locate_edits(recipe: dict, work: Path, backbone: str, trainer: lightning.Trainer | None) -> Path:
    """The list of edits, of bundled renders or of new ones."""
    from harmony.data.sources.editing import generate

    if not recipe["count"]:
        return locate(recipe) / "edits.jsonl"
    renders = work / recipe["name"] / f"renders-{recipe['count']}"
    renders.mkdir(parents=True, exist_ok=True)
    with FileLock(renders / ".rendering"):  # of several processes one renders
        return generate(renders, recipe["count"]) / "edits.jsonl"


def locate_pictures(recipe: dict, work: Path, backbone: str, trainer: lightning.Trainer | None) -> Path:
    """The folder with the few pictures of one thing."""
    return locate(recipe)


LAYOUTS = {
    "open_images": Layout(prepare_open_images),
    "folder": Layout(prepare_folder),
    "backbone": Layout(prepare_pixels),
    "editing": Layout(locate_edits, manifest=False),
    "pictures": Layout(locate_pictures, manifest=False),
}


def layout_of(recipe: dict) -> Layout:
    """The recipe's layout. UserError for one that does not exist."""
    if recipe["layout"] not in LAYOUTS:
        raise UserError(f"dataset.layout={recipe['layout']}: no such layout; choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[recipe["layout"]]


def captioner(backbone: str) -> str | Path:
    """The backbone's BLIP, or a public one where it has none."""
    part = Path(backbone_path(backbone)) / "captioner"
    return part if part.is_dir() else BLIP


def prepare(recipe: dict, backbone: str, work: str, trainer: lightning.Trainer | None = None) -> Path:
    """Prepare the dataset of a recipe under ``work``; returns the manifest, or what is read in place of one.

    ``backbone`` is the folder with the captioner, which runs in all processes of ``trainer`` (see
    ``shards.predictor``).
    """
    layout, folder = layout_of(recipe), Path(work).resolve() / recipe["name"]
    if not layout.manifest:
        return layout.prepare(recipe, folder.parent, backbone, trainer)
    trainer = trainer or predictor()
    if trainer.is_global_zero:
        (folder / "recipe.json").unlink(missing_ok=True)  # nothing is prepared until all is done
    layout.prepare(recipe, folder.parent, backbone, trainer)
    if trainer.is_global_zero:
        write_json(folder / "recipe.json", recipe)
    return folder / "manifest.jsonl"


def ensure(recipe: dict, backbone: str, work: str) -> Path:
    """Prepare unless the same recipe has been prepared already.

    In a process of its own, which ends with its database: training processes must never import FiftyOne. Of several
    processes that ask at once (ranks, or two commands) one prepares and the others wait for it.
    """
    if not layout_of(recipe).manifest:
        return prepare(recipe, backbone, work)
    folder = Path(work).resolve() / recipe["name"]
    manifest = folder / "manifest.jsonl"
    if is_prepared(folder, recipe):
        return manifest
    with lock(folder):
        if is_prepared(folder, recipe):  # while this process waited
            return manifest
        context, here = get_context("spawn"), os.getpid()
        with ProcessPoolExecutor(1, mp_context=context, initializer=end_with, initargs=(here,)) as process:
            with ignore_ctrl_c_in_children():
                manifest = process.submit(prepare, recipe, backbone, work)
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
