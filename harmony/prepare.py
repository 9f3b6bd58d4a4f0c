"""F6. ``python -m harmony.prepare dataset=NAME``: from annotations (or a recipe for renders) to a manifest."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from harmony.config import entry, write_json


def prepare(recipe: dict, kit: str, work: str) -> Path:
    """Prepare the dataset of a recipe under ``work``; returns the manifest. ``kit`` is where the captioner lies."""
    from harmony.data.open_images import locate, prepare_dataset
    from harmony.data.pool import prepare_kit
    from harmony.models.kit import kit_path

    recipe, work = dict(recipe), Path(work).resolve()
    if recipe["layout"] == "kit":
        recipe["dir"] = locate(recipe)
        manifest = prepare_kit(recipe, work)
    else:
        if recipe.get("count"):
            from harmony.data.studio import generate

            recipe["dir"] = str(generate(work / recipe["name"] / f"renders-{recipe['count']}", recipe["count"]))
        captioner = Path(kit_path(kit)) / "captioner"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        manifest = prepare_dataset(recipe, work, captioner if captioner.is_dir() else None, device)
    return manifest


def ensure(recipe: dict, kit: str, work: str) -> Path:
    """Prepare unless the same recipe has been prepared already.

    In a process of its own, which ends with its database: training processes must never import FiftyOne.
    """
    folder = Path(work).resolve() / recipe["name"]
    done, manifest = folder / "recipe.json", folder / "manifest.jsonl"
    if manifest.exists() and done.exists() and json.loads(done.read_text()) == recipe:
        return manifest
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        manifest = process.submit(prepare, recipe, kit, work).result()
    write_json(done, recipe)
    return manifest


@entry("prepare")
def main(cfg: DictConfig) -> None:
    """Prepare a dataset: select, import into FiftyOne, check pixels, caption, write the manifest."""
    recipe = OmegaConf.to_container(cfg.dataset, resolve=True)
    manifest = prepare(recipe, cfg.model.path, cfg.paths.work)
    write_json(manifest.parent / "recipe.json", recipe)
    print(manifest.resolve())


if __name__ == "__main__":
    main()
