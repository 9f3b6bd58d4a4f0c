"""The folder of a recipe, its pictures and their captions."""

import json
from pathlib import Path

from harmony.core.errors import UserError
from harmony.core.files import bundled

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def locate(recipe: dict) -> Path:
    """Find ``recipe.dir`` in the current folder, else beside the package (a clone). UserError if it does not exist."""
    if recipe["dir"] is None:
        raise UserError(f"dataset.dir is not set; give the folder of dataset {recipe['name']}: dataset.dir=PATH")
    places = [Path(recipe["dir"]), bundled(recipe["dir"])]
    for place in places:
        if place.is_dir():
            return place.resolve()
    raise UserError(f"dataset.dir={recipe['dir']}: no such folder ({places[0].resolve()}); give an existing one")


def image_files(folder: Path) -> list[Path]:
    """The picture files of ``folder``, without its subfolders, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def list_pictures(folder: Path) -> list[Path]:
    """List the picture files of a folder, sorted by name. UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with three to five pictures")
    files = image_files(folder)
    if not files:
        raise UserError(f"{folder}: no pictures ({', '.join(SUFFIXES)}) in it; put three to five there")
    return files


def folder_captions(folder: Path) -> dict[str, list[str]]:
    """Captions of a folder from ``captions.json``, {name: caption or [caption, ...]}; empty if there is no file."""
    path = folder / "captions.json"
    if not path.is_file():
        return {}
    try:
        captions = json.loads(path.read_text(encoding="utf-8"))
        return {name: [texts] if isinstance(texts, str) else list(texts) for name, texts in captions.items()}
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise UserError(f'{path}: expected {{"<name>": "<caption>", ...}} ({error}); mend it or remove it') from None
