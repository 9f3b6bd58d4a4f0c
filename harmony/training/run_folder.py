"""Reads a run folder as plain data.

The folder may come from a stranger, so nothing in it is called, imported or resolved: values are plain values,
``${...}`` is text, and the names of classes are only compared with ours. Links are refused, because they can point at
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

PlainValue = str | int | float | bool
# last parts of ``_target_``, old names of renamed classes included; older runs have other modules before them
BACKBONES = ("Backbone", "Kit")  # the latter in runs of version 0.1
TASKS = ("ControlTask", "JointTask", "ExemplarTask")


def select(tree: Any, key: str, kind: Any, source: str) -> Any:
    """The value at a dotted ``key`` of nested mappings, or None. UserError unless it is a ``kind``."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    if tree is not None and not isinstance(tree, kind):
        raise UserError(f"{source}: {key} must not be a {type(tree).__name__}: correct it there")
    return tree


@dataclass(frozen=True)
class RunFolder:
    """The run folder at ``path`` (absolute), with the values of its files."""

    path: Path

    # ------------------------------------------------------------------------------------------------ files

    def check(self, path: Path) -> None:
        """UserError unless ``path`` lies in the run and is, like each folder above it there, no link or device."""
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
        """UserError unless ``folder`` and everything in it are regular files and folders."""
        for path in (folder, *folder.rglob("*")):
            self.check(path)

    def find_file(self, name: str | Path) -> Path | None:
        """The regular file ``name`` of the run, or None. UserError for a link or a device."""
        path = self.path / name
        if not (path.exists() or path.is_symlink()):
            return None
        self.check(path)
        if not path.is_file():
            raise UserError(f"{path} is a folder where a file belongs: restore it from a copy")
        return path

    def read_mapping(self, name: str, parse: Callable[[str], Any]) -> dict:
        """The keys and values of a file, empty where there is no file. UserError for a damaged file."""
        file = self.find_file(name)
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
        return self.read_mapping("config.yaml", yaml.safe_load)

    @cached_property
    def provenance(self) -> dict:
        return self.read_mapping("provenance.json", json.loads)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The final figures, empty until the run has ended."""
        numbers = self.read_mapping("metrics.json", json.loads)
        try:
            return {name: float(value) for name, value in numbers.items()}
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{self.path}/metrics.json holds no numbers ({error}): restore it from a copy") from None

    @property
    def has_ended(self) -> bool:
        return self.find_file("metrics.json") is not None

    @property
    def grid(self) -> Path | None:
        """The last sample grid, or None."""
        name = max((path.name for path in (self.path / "grids").glob("*.png")), default=None)
        return name and self.find_file(f"grids/{name}")

    # ------------------------------------------------------------------------------------------------ values

    def read_option(self, key: str, kind: Any = PlainValue) -> Any:
        """A value of ``config.yaml``, or None."""
        return select(self.config, key, kind, f"{self.path}/config.yaml")

    def read_fact(self, key: str, kind: Any = PlainValue) -> Any:
        """A value of ``provenance.json``, or None."""
        return select(self.provenance, key, kind, f"{self.path}/provenance.json")

    @property
    def checkpoint(self) -> dict[str, PlainValue] | None:
        """The facts of the checkpoint that the end of the run has exported; None for a run of an older version."""
        kinds = {"kind": str, "step": int, "figure": str, "value": (int, float)}
        facts = {name: self.read_fact(f"checkpoint.{name}", kind) for name, kind in kinds.items()}
        if facts["kind"] is None or facts["step"] is None:
            return None
        is_validated = facts["figure"] is not None and facts["value"] is not None
        return facts if is_validated else {name: facts[name] for name in ("kind", "step")}

    # ------------------------------------------------------------------------------------------------ classes

    def check_class(self, node: str, names: tuple[str, ...]) -> str:
        """The name of the class at ``node`` of the configuration. UserError unless it is one of ``names``."""
        target = self.read_option(f"{node}._target_")
        name = str(target).rpartition(".")[2]
        if name not in names:
            file = f"{self.path}/config.yaml"
            raise UserError(f"{file}: {node}._target_ is {target}, but export takes runs of {', '.join(names)} alone")
        return name

    @property
    def task(self) -> str | None:
        """The class of the task, one of TASKS; None for a folder that is no run."""
        if not self.config:
            return None
        self.check_class("model", BACKBONES)
        return self.check_class("module", TASKS)

    def load_backbone(self) -> Backbone:
        """The backbone that the run was trained on."""
        self.check_class("model", BACKBONES)
        path, weights, geometry = (self.read_option(f"model.{name}") for name in ("path", "weights", "geometry"))
        return Backbone(str(path), str(weights or "hub"), geometry=geometry and str(geometry))


def find_run(path: Path) -> RunFolder:
    """The run folder that is ``path`` or has it as its export; ``path`` itself where there is no run."""
    path = path.resolve()
    return RunFolder(next((folder for folder in (path, *path.parents[:3]) if (folder / "config.yaml").exists()), path))
