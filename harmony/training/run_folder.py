"""A run folder read as plain data.

The folder may come from a stranger. So nothing that it holds is called, imported or resolved: values are plain values,
``${...}`` is text, and a class is only compared with the names of ours. Links are refused, for they can point at
anything on this machine.
"""

import json
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from harmony.core.errors import UserError
from harmony.models.backbone import Backbone

Plain = str | int | float | bool
# last parts of ``_target_``: modules move, and runs from before name the old ones; so will runs of renamed classes
BACKBONES = ("Backbone", "Kit")  # the latter in runs of version 0.1
TASKS = ("ControlTask", "JointTask", "ExemplarTask")


def select(tree: Any, key: str, kind: Any, source: str) -> Any:
    """The value at a dotted ``key`` of nested mappings, None where there is none. UserError unless it is a ``kind``."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    if tree is not None and not isinstance(tree, kind):
        raise UserError(f"{source}: {key} must not be a {type(tree).__name__}: correct it there")
    return tree


@dataclass(frozen=True)
class RunFolder:
    """``path`` (absolute) and what the files in it say."""

    path: Path

    # ------------------------------------------------------------------------------------------------ files

    def check(self, path: Path) -> None:
        """UserError unless ``path``, which lies in the run, and each folder above it there is a file or folder itself,
        no link.
        """
        for entry in (path, *path.parents):
            if entry == self.path:
                return
            mode = entry.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise UserError(
                    f"{entry} is no regular file: export reads nothing outside {self.path}; put a copy in its place"
                )
        raise UserError(f"{path} lies outside {self.path}: give the folder that holds both")

    def check_all(self, folder: Path) -> None:
        """UserError unless ``folder`` and all that it holds are files and folders, no links."""
        for path in (folder, *folder.rglob("*")):
            self.check(path)

    def file(self, name: str | Path) -> Path | None:
        """The regular file ``name`` of the run, None where there is none. UserError for a link or a device."""
        path = self.path / name
        if not (path.exists() or path.is_symlink()):
            return None
        self.check(path)
        if not path.is_file():
            raise UserError(f"{path} is a folder where a file belongs: restore it from a copy")
        return path

    def mapping(self, name: str, parse: Callable[[str], Any]) -> dict:
        """The keys and values of a file, none where there is no file. UserError for a damaged one."""
        file = self.file(name)
        if file is None:
            return {}
        try:
            content = parse(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"{file} cannot be read ({' '.join(str(error).split())}): restore it from a copy") from None
        if not isinstance(content, dict):
            raise UserError(f"{file} must hold keys and values, not a {type(content).__name__}: restore it from a copy")
        return content

    @cached_property
    def config(self) -> dict:
        return self.mapping("config.yaml", yaml.safe_load)

    @cached_property
    def provenance(self) -> dict:
        return self.mapping("provenance.json", json.loads)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The final figures, none while the run goes on."""
        numbers = self.mapping("metrics.json", json.loads)
        try:
            return {name: float(value) for name, value in numbers.items()}
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{self.path}/metrics.json holds no numbers ({error}): restore it from a copy") from None

    @property
    def ended(self) -> bool:
        return self.file("metrics.json") is not None

    @property
    def grid(self) -> Path | None:
        """The last sample grid, None where there is none."""
        last = max((path.name for path in (self.path / "grids").glob("*.png")), default=None)
        return last and self.file(f"grids/{last}")

    # ------------------------------------------------------------------------------------------------ values

    def option(self, key: str, kind: Any = Plain) -> Any:
        """A value of ``config.yaml``, None where there is none."""
        return select(self.config, key, kind, f"{self.path}/config.yaml")

    def fact(self, key: str, kind: Any = Plain) -> Any:
        """A value of ``provenance.json``, None where there is none."""
        return select(self.provenance, key, kind, f"{self.path}/provenance.json")

    # ------------------------------------------------------------------------------------------------ classes

    def known_class(self, node: str, names: tuple[str, ...]) -> str:
        """The class that ``node`` of the configuration names. UserError unless it is one of ``names``."""
        target = self.option(f"{node}._target_")
        name = str(target).rpartition(".")[2]
        if name not in names:
            file = f"{self.path}/config.yaml"
            raise UserError(f"{file}: {node}._target_ is {target}, but export takes runs of {', '.join(names)} alone")
        return name

    @property
    def task(self) -> str | None:
        """What the run trained, one of TASKS; None for a folder that is no run."""
        if not self.config:
            return None
        self.known_class("model", BACKBONES)
        return self.known_class("module", TASKS)

    def backbone(self) -> Backbone:
        """The backbone that the run was trained on."""
        self.known_class("model", BACKBONES)
        path, weights, geometry = (self.option(f"model.{name}") for name in ("path", "weights", "geometry"))
        return Backbone(str(path), str(weights or "hub"), geometry=geometry and str(geometry))


def find_run(path: Path) -> RunFolder:
    """The run that ``path`` is or that holds it as its export; ``path`` itself where there is no run."""
    path = path.resolve()
    return RunFolder(next((folder for folder in (path, *path.parents[:3]) if (folder / "config.yaml").exists()), path))
