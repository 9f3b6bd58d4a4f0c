"""Preparation of datasets: from a recipe in any layout to a manifest, once for each recipe."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import lightning
from filelock import FileLock

from harmony.core.errors import UserError
from harmony.core.files import list_missing, remove_unused, write_json
from harmony.core.foreign import path_inside, read_json
from harmony.core.progress import tell
from harmony.core.quiet import quiet_libraries
from harmony.core.signals import end_with, ignore_ctrl_c_in_children
from harmony.data.captions import BLIP
from harmony.data.shards import predictor
from harmony.data.sources.files import locate
from harmony.data.stamps import has_changed
from harmony.models.shipped import backbone_path


class Layout(NamedTuple):
    """How a dataset in one layout is prepared: ``prepare(recipe, work, backbone, trainer)``.

    With ``manifest`` it writes ``work/<name>/manifest.jsonl``, and all processes of ``trainer`` call it. Without it
    the dataset has no masks and is used directly: ``prepare`` returns the file or folder to read.
    """

    prepare: Callable[[dict, Path, str, lightning.Trainer | None], Path]
    manifest: bool = True


# These functions import their libraries themselves: a prepared dataset needs neither polars nor FiftyOne.


def prepare_open_images(recipe: dict, work: Path, backbone: str, trainer: lightning.Trainer) -> Path:
    """Prepare photographs or renders in Open Images layout."""
    from harmony.data.sources.open_images.preparation import prepare_dataset
    from harmony.data.sources.open_images.source import OPEN_IMAGES

    return prepare_dataset(recipe, work, OPEN_IMAGES, captioner(backbone), trainer)


def prepare_folder(recipe: dict, work: Path, backbone: str, trainer: lightning.Trainer) -> Path:
    """Prepare a user's photographs and masks."""
    from harmony.data.sources.folder import FOLDER
    from harmony.data.sources.open_images.preparation import prepare_dataset

    return prepare_dataset(recipe, work, FOLDER, captioner(backbone), trainer)


def prepare_pairs(recipe: dict, work: Path, backbone: str, trainer: lightning.Trainer) -> Path:
    """Prepare composites with the photographs that they should become."""
    from harmony.data.sources.open_images.preparation import prepare_dataset
    from harmony.data.sources.pairs import PAIRS

    return prepare_dataset(recipe, work, PAIRS, captioner(backbone), trainer)


def prepare_coco(recipe: dict, work: Path, backbone: str, trainer: lightning.Trainer) -> Path:
    """Prepare the instances of a dataset in COCO's JSON."""
    from harmony.data.sources.coco import COCO
    from harmony.data.sources.open_images.preparation import prepare_dataset

    return prepare_dataset(recipe, work, COCO, captioner(backbone), trainer)


def prepare_bench(recipe: dict, work: Path, backbone: str, trainer: lightning.Trainer) -> Path:
    """Prepare a bench of composition, whose objects come from other pictures."""
    from harmony.data.sources.benches import find_bench
    from harmony.data.sources.open_images.preparation import prepare_dataset

    return prepare_dataset(recipe, work, find_bench(recipe["bench"]), captioner(backbone), trainer)


def prepare_pixels(recipe: dict, work: Path, backbone: str, trainer: lightning.Trainer) -> Path:
    """Prepare the pixels that a backbone is trained on."""
    if trainer.is_global_zero:
        from harmony.data.sources.pixels import prepare_backbone

        prepare_backbone(recipe, work)
    return work / recipe["name"] / "manifest.jsonl"


def locate_edits(recipe: dict, work: Path, backbone: str, trainer: lightning.Trainer | None) -> Path:
    """Find the list of edits of the bundled renders, or render new ones."""
    from harmony.data.sources.editing import generate

    if not recipe["count"]:
        return locate(recipe) / "edits.jsonl"
    renders = work / recipe["name"] / f"renders-{recipe['count']}"
    renders.mkdir(parents=True, exist_ok=True)
    with FileLock(renders / ".rendering"):  # only one of several processes renders
        return generate(renders, recipe["count"]) / "edits.jsonl"


def prepare_pie_bench(recipe: dict, work: Path, backbone: str, trainer: lightning.Trainer | None) -> Path:
    """Prepare the edits of PIE-Bench."""
    from harmony.data.sources.pie_bench import prepare_edits

    with lock(work / recipe["name"]):  # only one of several processes writes
        return prepare_edits(recipe, work)


def locate_pictures(recipe: dict, work: Path, backbone: str, trainer: lightning.Trainer | None) -> Path:
    """Find the folder with the few pictures of one concept."""
    return locate(recipe)


LAYOUTS = {
    "open_images": Layout(prepare_open_images),
    "folder": Layout(prepare_folder),
    "pairs": Layout(prepare_pairs),
    "coco": Layout(prepare_coco),
    "bench": Layout(prepare_bench),
    "backbone": Layout(prepare_pixels),
    "editing": Layout(locate_edits, manifest=False),
    "pie_bench": Layout(prepare_pie_bench, manifest=False),
    "pictures": Layout(locate_pictures, manifest=False),
}


def find_layout(recipe: dict) -> Layout:
    """Find the recipe's layout. UserError if it does not exist."""
    if recipe["layout"] not in LAYOUTS:
        raise UserError(f"dataset.layout={recipe['layout']}: no such layout; choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[recipe["layout"]]


def captioner(backbone: str) -> str | Path:
    """The folder of the backbone's BLIP, or the hub id of a public one."""
    part = Path(backbone_path(backbone)) / "captioner"
    return part if part.is_dir() else BLIP


def locate_recipe(recipe: dict) -> dict:
    """The recipe with the absolute path of its folder: the same words mean another folder elsewhere."""
    return recipe if recipe.get("dir") is None else recipe | {"dir": str(locate(recipe))}


def find_place(recipe: dict, work: str) -> Path:
    """Find the folder of the prepared dataset, ``work/<name>``. UserError for a name that leads out of ``work``."""
    return path_inside(Path(work).resolve(), str(recipe["name"]))


def prepare(recipe: dict, backbone: str, work: str, trainer: lightning.Trainer | None = None) -> Path:
    """Prepare the dataset of a recipe under ``work``; returns the manifest, or the path to read instead of one.

    ``backbone`` is the folder with the captioner, which runs in all processes of ``trainer`` (see
    ``shards.predictor``).
    """
    layout, folder = find_layout(recipe), find_place(recipe, work)
    if not layout.manifest:
        return layout.prepare(recipe, folder.parent, backbone, trainer)
    recipe = locate_recipe(recipe)
    trainer = trainer or predictor()
    if trainer.is_global_zero:
        (folder / "recipe.json").unlink(missing_ok=True)  # the dataset counts as prepared when everything is done
    layout.prepare(recipe, folder.parent, backbone, trainer)
    if trainer.is_global_zero:
        write_json(folder / "recipe.json", recipe)
    return folder / "manifest.jsonl"


def ensure(recipe: dict, backbone: str, work: str) -> Path:
    """Prepare a dataset unless the same recipe has been prepared already and no file has changed since.

    This runs in a separate process, which ends with its database, because training processes must never import
    FiftyOne. Of several processes that call this at once (ranks, or two commands) one prepares and the others wait.
    """
    if not find_layout(recipe).manifest:
        return prepare(recipe, backbone, work)
    recipe, folder = locate_recipe(recipe), find_place(recipe, work)
    manifest = folder / "manifest.jsonl"
    if is_prepared(folder, recipe):
        return manifest
    if read_recipe(folder) == recipe:
        tell(f"{recipe['name']}: files have changed since it was prepared, preparing it again")
    with lock(folder):
        if is_prepared(folder, recipe):  # prepared by another process in the meantime
            return manifest
        context, pid = get_context("spawn"), os.getpid()
        with ProcessPoolExecutor(1, mp_context=context, initializer=begin, initargs=(pid,)) as pool:
            with ignore_ctrl_c_in_children():
                future = pool.submit(prepare, recipe, backbone, work)
            try:
                return future.result()
            except KeyboardInterrupt:
                for worker in pool._processes.values():  # ``kill_workers`` of Python 3.14
                    worker.kill()
                raise


def begin(parent: int) -> None:
    """What the process that prepares for ``parent`` begins with: it ends with it, and its libraries are as quiet."""
    end_with(parent)
    quiet_libraries()


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """The lock of the process that prepares ``folder``; the system releases it if that process dies.

    A folder that is new goes again where the dataset is refused before anything is written.
    """
    missing, mark = list_missing(folder), ".preparing"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / mark, is_singleton=True):  # a layout may hold it once more
            yield
    except UserError:
        remove_unused(missing, mark)
        raise


def is_prepared(folder: Path, recipe: dict) -> bool:
    """Whether ``folder`` holds the manifest of exactly this recipe and of the files as they are."""
    return (folder / "manifest.jsonl").exists() and read_recipe(folder) == recipe and not has_changed(folder)


def read_recipe(folder: Path) -> dict | None:
    """Read the recipe of the dataset that is prepared in ``folder``; None if there is none."""
    try:
        return read_json(folder / "recipe.json")
    except UserError:
        return None
