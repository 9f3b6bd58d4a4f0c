"""Files that a run depended on or made, as W&B shows them with their lineage."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from harmony.cli.compose import load_yaml
from harmony.core.files import PACKAGE

WEIGHTS = ".safetensors"
OWN_FILES = (WEIGHTS, ".json")  # of a network; a card and pictures may be added to its folder later
LONGEST = 128  # characters of a name, which W&B takes
ASSETS = PACKAGE / "assets"
PLACES = ("export", "controlnet")  # folders that say nothing of what is in them


@dataclass(frozen=True)
class Artifact:
    """``files`` (name -> path) of one ``kind``: manifest, latents or model.

    ``facts``: what W&B shows of it; ``aliases``: beside ``latest``.
    """

    name: str
    kind: str
    files: Mapping[str, Path]
    facts: Mapping[str, Any] = field(default_factory=dict)
    aliases: Sequence[str] = ()


def manifest_artifact(dataset: str, manifest: Path) -> Artifact:
    """A prepared dataset: its manifest, which has the hash of every file."""
    return Artifact(dataset, "manifest", {manifest.name: manifest})


def latents_artifact(dataset: str, indices: Mapping[str, Path]) -> Artifact:
    """Latent caches: of each split the file that describes its cache."""
    return Artifact(dataset, "latents", {f"{split}.json": index for split, index in indices.items()})


def model_artifact(folder: Path, facts: Mapping[str, Any] | None = None, aliases: Sequence[str] = ()) -> Artifact:
    """A network in its folder, named by the run that trained it and the backbone, else by where it lies."""
    folder = folder.resolve()
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.suffix in OWN_FILES}
    return Artifact(name_network(folder), "model", files, facts or {}, aliases)


def name_network(folder: Path) -> str:
    """EXPERIMENT-BACKBONE of a network in a run, shipped-NAME of one that comes along, else the name of its folder."""
    if folder.is_relative_to(ASSETS):
        return f"shipped-{folder.relative_to(ASSETS).parts[0]}"
    for run in folder.parents[:4]:
        if folder.is_relative_to(run / "export") and (run / "config.yaml").is_file():
            config = load_yaml(run / "config.yaml")
            name, backbone = (OmegaConf.select(config, key, default="") for key in ("name", "model.path"))
            part = folder.relative_to(run / "export").parts[:-1]  # of a run that trains several
            return "-".join(str(each) for each in (name, *part, Path(str(backbone)).name) if each)
    return next((part for part in reversed(folder.parts) if part not in PLACES), "")


def to_name(name: str, kind: str) -> str:
    """``name-kind`` as W&B takes it, ASCII and not too long; what had to be changed is told apart by a hash.

    The kind is part of it, because W&B knows each name as of one kind.
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    room = LONGEST - len(kind) - 1
    if plain != name or not name or len(name) > room:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        plain = f"{plain[: room - 9]}-{digest}"
    return f"{plain}-{kind}"
