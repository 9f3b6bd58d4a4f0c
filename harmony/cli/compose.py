"""Composing configurations with Hydra: its groups, and the files of ``experiments/`` and ``datasets/``.

Experiments and recipes lie beside the package in a clone, where Hydra does not look, so they are registered by hand.
Three folders are searched and the first that has a name wins: the environment variable, the current folder, what is
bundled with the package.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from harmony.core.errors import UserError
from harmony.core.files import PACKAGE, bundled

CONFIGS = PACKAGE / "configs"


# group: (environment variable, folder, files, the name of one, package of its keys)
GROUPS: dict[str, tuple[str, str, str, Callable[[Path], str], str]] = {
    "experiment": ("HARMONY_EXPERIMENTS", "experiments", "*.yaml", lambda path: path.stem, "_global_"),
    "dataset": ("HARMONY_DATASETS", "datasets", "*/recipe.yaml", lambda path: path.parent.name, "dataset"),
}


OmegaConf.register_new_resolver("default", lambda value, other: other if value is None else value, replace=True)


def places(group: str) -> list[Path]:
    """Folders in which the files of ``group`` (``experiment`` or ``dataset``) are looked for, first wins."""
    variable, folder = GROUPS[group][:2]
    chosen = [Path(os.environ[variable])] if os.environ.get(variable) else []
    return [place.resolve() for place in (*chosen, Path(folder), bundled(folder))]


def options(group: str) -> dict[str, Path]:
    """Name and file of each option of ``group``, sorted by name."""
    files = {name: path for place in reversed(places(group)) for name, path in list_files(group, place).items()}
    return dict(sorted(files.items()))


def list_files(group: str, place: Path) -> dict[str, Path]:
    """Name and file of each option of ``group`` in one folder."""
    _, _, pattern, name_of, _ = GROUPS[group]
    return {name_of(path): path for path in place.glob(pattern)}


def list_bundled(group: str) -> dict[str, Path]:
    """Name and file of each option of ``group`` that comes with the package."""
    return list_files(group, places(group)[-1])


def why(path: Path) -> str:
    """First comment line of a YAML file: what it is for."""
    lines = (line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next((line for line in lines if line and not line.startswith("@package")), "")


def load_yaml(path: Path) -> DictConfig:
    """A YAML file that holds a mapping. Raises UserError when it does not."""
    try:
        node = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid YAML: {one_line(error)}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{path} must hold a mapping of keys to values")
    return node


def register(strip_experiments: bool = False) -> None:
    """Put experiments and recipes into Hydra's ConfigStore; stripped experiments keep their defaults list only."""
    store = ConfigStore.instance()
    for group, (*_, package) in GROUPS.items():
        store.repo.pop(group, None)  # what another current folder had to offer
        for name, path in options(group).items():
            node = load_yaml(path)
            if strip_experiments and group == "experiment":
                node = OmegaConf.create({"defaults": node.get("defaults", ["_self_"])})
            store.store(group=group, name=name, node=node, package=package)


def compose(
    name: str, overrides: Iterable[str] = (), config_dir: Path = CONFIGS, strip_experiments: bool = False
) -> DictConfig:
    """The configuration that ``python -m harmony.<name> <overrides>`` would see. Raises Hydra's own errors."""
    register(strip_experiments)
    running = GlobalHydra.instance().hydra  # set inside a command, where Hydra would refuse a second composition
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(Path(config_dir).resolve()), version_base="1.3"):
            return hydra.compose(name, overrides=list(overrides))
    finally:
        GlobalHydra.instance().hydra = running


def one_line(error: object) -> str:
    """The text of an error without its line breaks."""
    return " ".join(str(error).split())
