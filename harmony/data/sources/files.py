"""The folder of a recipe, its pictures and their captions."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from harmony.core.errors import UserError
from harmony.core.files import bundled
from harmony.core.foreign import read_json
from harmony.core.progress import tell
from harmony.core.row import SPLITS
from harmony.pixels.images import SUFFIXES

OTHER_NAMES = {"validation": ("val", "valid", "dev")}  # of split folders
SPLIT_NAMES = {name: split for split in SPLITS for name in (split, *OTHER_NAMES.get(split, ()))}


def locate(recipe: dict) -> Path:
    """Find ``recipe.dir`` in the current folder, else beside the package (a clone). UserError if it does not exist."""
    if recipe["dir"] is None:
        raise UserError(f"dataset.dir is not set; give the folder of dataset {recipe['name']}: dataset.dir=PATH")
    places = [Path(recipe["dir"]), bundled(recipe["dir"])]
    for place in places:
        if place.is_dir():
            return place.resolve()
    raise UserError(f"dataset.dir={recipe['dir']}: no such folder ({places[0].resolve()}); give an existing one")


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split: by its name, or else by another name that tools give it."""
    names = (split, *OTHER_NAMES.get(split, ()))
    return next((root / name for name in names if (root / name).is_dir()), root / split)


def list_words(name: str) -> list[str]:
    """List the words of a name, its runs of letters, in lower case."""
    return re.findall(r"[^\W\d_]+", name.lower())


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


def picture_name(name: str) -> str:
    """The name of a picture without its suffix, if it has one of a picture."""
    return name[: -len(suffix)] if (suffix := Path(name).suffix).lower() in SUFFIXES else name


def read_caption_file(path: Path, names: Collection[str] | None = None) -> dict[str, list[str]]:
    """Read {name: caption or [caption, ...]} by the pictures' names without suffix; empty if there is no file.

    A key may have the picture's suffix. Captions that are no text, and with ``names`` those of no picture, are left out
    with a line. UserError for another content.
    """
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f'{path}: expected {{"<name>": "<caption>", ...}}; mend it or remove it')
    captions, wrong_names = {}, []
    for key, value in content.items():
        texts = [value] if isinstance(value, str) else value
        is_right = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
        name = key if names is not None and key in names else picture_name(key)
        if is_right and (names is None or name in names):
            captions.setdefault(name, texts)
        else:
            wrong_names.append(key)
    tell_omissions(f"{path}: captions without a text or a picture", wrong_names)
    return captions


def folder_captions(folder: Path, names: Collection[str] | None = None) -> dict[str, list[str]]:
    """Read the captions of a folder from its ``captions.json``; see ``read_caption_file``."""
    return read_caption_file(folder / "captions.json", names)


def tell_omissions(title: str, names: Sequence[str]) -> None:
    """Print how many things are left out, and the first of them, if there are any."""
    tell_names(title, names, " left out")


def tell_names(title: str, names: Sequence[str], note: str = "") -> None:
    """Print how many things there are, with a note, and the first of them, if there are any."""
    if names:
        tell(f"{title}: {len(names)}{note}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")
