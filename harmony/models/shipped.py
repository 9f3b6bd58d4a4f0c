"""Where weights lie: the one place that turns a shipped name, a run, a folder or a hub id into a folder."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmony.core.errors import UserError
from harmony.core.files import PACKAGE
from harmony.core.hub import fetch_folder

ASSETS = PACKAGE / "assets"
GIVE = "give a run folder, a diffusers folder or a hub id (owner/name)"


@dataclass(frozen=True)
class Weights:
    """A kind of weights: ``file`` marks their folder, which is one of ``places`` below a run or below what was given.

    ``what`` names them in messages, which end in ``remedy``; ``hub``: whether they may come from a hub; ``several``: a
    folder below ``export/NAME``, where a run may export more than one.
    """

    what: str
    file: str
    places: tuple[str, ...] = ("",)
    hub: bool = False
    several: str = ""
    remedy: str = GIVE


CONTROLNET = Weights("ControlNet", "config.json", ("export/controlnet", "export", "controlnet", ""), True, "controlnet")
PAINTER = Weights(
    "Paint by Example", "image_encoder/config.json", ("export/paint_by_example", "paint_by_example", ""), hub=True
)
JUDGE = Weights("judge", "judge.json", ("export", ""), remedy="give a run of experiment=judge")
WORD = Weights(
    "learned word", "learned_embeds.safetensors", ("export", ""), remedy="give a run of experiment=textual_inversion"
)
CLIP_TOWER = Weights("CLIP vision tower", "config.json", hub=True)
CAPTIONER = Weights("BLIP captioner", "config.json", hub=True)


def find_asset(name: str | os.PathLike) -> Path | None:
    """The file or folder that is shipped under ``name``, such as ``color`` or ``words/teal_mug``; None where none is.

    No name leads out of the assets.
    """
    parts = Path(name).parts
    path = ASSETS / name
    return path if parts and ".." not in parts and not Path(name).is_absolute() and path.exists() else None


def find_weights(kind: Weights, name: str | os.PathLike) -> Path | None:
    """The folder of the weights that ``name`` means: what is shipped, a run, an export, or the folder itself.

    A shipped name comes before a folder of the same name; write ``./name`` for that. None where ``name`` may be a hub
    id, owner/name. UserError for a run that has not ended, a folder without such weights, and a name that means
    nothing.
    """
    folder = find_asset(name) or Path(name)
    for place in kind.places:
        if (folder / place / kind.file).is_file():
            return folder / place
    if several := sorted(path.parent for path in folder.glob(f"export/*/{kind.several}")) if kind.several else ():
        raise UserError(f"{name} trained several: choose one of {', '.join(map(str, several))}")
    if (folder / "checkpoints").is_dir():
        raise UserError(f"{name} is a run that has not ended: export it first, python -m harmony.export {name}")
    if folder.exists():
        raise UserError(f"{name} holds no {kind.what} ({kind.file}): {kind.remedy}")
    if not kind.hub or str(name).count("/") != 1:
        raise UserError(f"there is no {kind.what} {name}: {kind.remedy}")
    return None


PLACES = {"controlnet": CONTROLNET, "structure": CONTROLNET, "painter": PAINTER, "evaluator": JUDGE}


def check_places(options: Mapping[str, Any]) -> None:
    """UserError for an option of a method that names weights or results which are not there; no hub is asked."""
    for name, kind in PLACES.items():
        if isinstance(place := options.get(name), str) and place != "statistic":
            find_weights(kind, place)
    if isinstance(folder := options.get("folder"), str) and not os.path.isdir(folder):
        raise UserError(f"{folder}: there is no such folder of results; give one that exists")


def list_networks(options: Mapping[str, Any]) -> list[Path]:
    """The folders of the networks that the options of a method name, those of a hub left out."""
    places = [(kind, options.get(option)) for option, kind in PLACES.items()]
    folders = [find_weights(kind, at) for kind, at in places if isinstance(at, str) and at != "statistic"]
    return [folder for folder in folders if folder is not None]


def find_exports(run: Path) -> list[Path]:
    """The folders of the networks that a run has exported, as ``find_weights`` finds each; none for a backbone."""
    for kind in (PAINTER, JUDGE, WORD, CONTROLNET):
        for place in kind.places:
            if place.startswith("export") and (run / place / kind.file).is_file():
                return [run / place]
        if kind.several and (several := sorted(run.glob(f"export/*/{kind.several}"))):
            return several
    return []


def fetch_weights(kind: Weights, name: str | os.PathLike) -> Path:
    """``find_weights``, or the folder of a hub id, fetched. UserError where the hub cannot be reached."""
    return find_weights(kind, name) or fetch_folder(str(name), remedy="give a run folder or a diffusers folder")


def backbone_path(name: str | os.PathLike) -> str:
    """The folder of a shipped backbone (``tiny``); any other name is returned as it is, a folder or a hub id."""
    asset = find_asset(name)
    return str(asset if asset is not None and (asset / "model_index.json").exists() else name)
