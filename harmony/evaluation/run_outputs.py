"""The stored outputs of a finished comparison, read again without any network."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf

from harmony.cli.compose import load_yaml
from harmony.cli.values import Choice, Items, Number, Text, Whole
from harmony.core.errors import UserError
from harmony.core.foreign import path_inside, read_json
from harmony.data.manifest import manifest_hash
from harmony.evaluation.blocks import outputs_of
from harmony.evaluation.eval_sets import (
    EXEMPLAR,
    RECONSTRUCT,
    RELIGHT,
    EvalSet,
    degrade,
    load_truths,
    paste_outputs,
)
from harmony.evaluation.figures import scores
from harmony.metrics.fidelity import limit

LARGEST = 4096  # px: side of a picture that an output may have
REMEDY = "give the folder of a finished comparison, such as evaluate experiment=table1 leaves"
FINGERPRINT = r"[0-9a-f]{16,128}"  # names a folder below ``outputs``
RULES = {  # of what is read of a run's configuration, which may come from elsewhere
    "paths.work": Text(),
    "dataset.name": Text(),
    "split": Text(),
    "limit": Whole(1, none=True),
    "seed": Whole(0),
    "study.eval_set": Choice((RECONSTRUCT, RELIGHT, EXEMPLAR)),
    "study.radius": Number(0),
    "study.degrade": Items(Whole(1)),
}


class StoredMethod(NamedTuple):
    """A method of which there is no more than what its outputs are called by."""

    fingerprint: str


@dataclass(frozen=True)
class RunOutputs:
    """A finished comparison: its ``items``, and the outputs of each row after paste-back."""

    folder: Path
    items: EvalSet
    pictures: dict[str, list[np.ndarray]]

    @property
    def keys(self) -> list[str]:
        """<split>/<id> of each item, as FiftyOne knows it."""
        return [f"{self.items.name}/{c.name}" for c in self.items.composites]

    def score(self, row: str) -> list[dict[str, float]]:
        """The figures of each picture of a row, those that are no number left out."""
        results = scores(self.items, self.pictures[row])
        return [{name: float(min(v, limit(name))) for name, v in r.items() if not np.isnan(v)} for r in results]


class Run(NamedTuple):
    """What a run folder says of its comparison: the hash of its ``manifest``, row -> fingerprint, and its options."""

    folder: Path
    manifest: str
    methods: dict[str, str]
    options: dict[str, Any]

    @property
    def rows(self) -> list[str]:
        return list(self.methods)

    @property
    def dataset(self) -> str:
        """The name of the dataset that it measured on."""
        return self.options["dataset.name"]

    def find_manifest(self, more: Iterable[Path] = ()) -> Path:
        """The manifest that the run measured on; ``more``: where else it may lie. UserError if it is not there."""
        work = self.options["paths.work"]
        folders = [path_inside(place / work, self.dataset) for place in (Path(), *self.folder.parents[2:3])]
        for place in (*more, *(folder / "manifest.jsonl" for folder in folders)):
            if place.is_file() and manifest_hash(place) == self.manifest:
                return place
        raise UserError(
            f"{self.folder} measured on dataset {self.dataset} as it no longer is in {folders[0]}: evaluate again"
        )

    def read(self, manifest: Path, rows: Iterable[str] | None = None) -> RunOutputs:
        """Its outputs of ``rows``, or of all. UserError where one is missing."""
        side = self.find_resolution()
        kind, split, limit, radius, factors = (
            self.options[name] for name in ("study.eval_set", "split", "limit", "study.radius", "study.degrade")
        )
        items = degrade(load_truths(kind, manifest, split, side, limit, radius), factors[0])
        pictures = {row: paste_outputs(items, self.read_raw(items, row)) for row in rows or self.rows}
        return RunOutputs(self.folder, items, pictures)

    def read_raw(self, items: EvalSet, row: str) -> list[np.ndarray]:
        """The outputs of a row as the method gave them."""
        try:
            outputs = outputs_of(items, StoredMethod(self.methods[row]), self.folder, self.options["seed"])
        except (OSError, ValueError, EOFError):
            raise UserError(f"{self.folder} lacks outputs of {row}: evaluate again") from None
        kinds = {(getattr(y, "dtype", None), getattr(y, "shape", None)) for y in outputs}
        if len(outputs) != len(items) or kinds != {(np.dtype(np.uint8), items.truths[0].shape)}:
            raise UserError(f"{self.folder} has other outputs of {row} than its pictures: evaluate again")
        return outputs

    def find_resolution(self) -> int:
        """The side of its outputs in pixels."""
        for fingerprint in self.methods.values():
            for file in sorted((self.folder / "outputs" / fingerprint[:16]).rglob("*.npy")):
                try:
                    shape = np.load(file, mmap_mode="r").shape
                except (OSError, ValueError, EOFError, AttributeError):
                    shape = ()
                if len(shape) != 4 or not 0 < shape[1] <= LARGEST:
                    raise UserError(f"{file} is no block of pictures: remove it and evaluate again")
                return shape[1]
        raise UserError(f"{self.folder} holds no outputs any more: evaluate again")


def open_run(folder: Path) -> Run:
    """The run in ``folder``. UserError unless it is a finished comparison of composites that have truths."""
    if not (folder / "provenance.json").is_file() or not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no finished run there; {REMEDY}")
    facts, config = read_json(folder / "provenance.json"), load_yaml(folder / "config.yaml")
    methods = facts.get("methods") if isinstance(facts, dict) else None
    if not isinstance(methods, dict) or not methods or read_option(config, "study.eval_set") is None:
        raise UserError(f"{folder}: no comparison of methods; {REMEDY}")
    options = {name: read_option(config, name) for name in RULES}
    for name, rule in RULES.items():
        if not rule.accepts(options[name]) and not (rule.none and options[name] is None):
            raise UserError(f"{folder / 'config.yaml'} says {name}={str(options[name])[:80]}, not {rule}")
    if options["study.eval_set"] == EXEMPLAR:
        raise UserError(f"{folder}: its composites have no truths; {REMEDY}")
    path_inside(folder, options["dataset.name"])
    prints = [*methods.values(), facts.get("manifest")]
    if not options["study.degrade"] or not all(isinstance(p, str) and re.fullmatch(FINGERPRINT, p) for p in prints):
        raise UserError(f"{folder / 'provenance.json'} lacks a fingerprint of a method or the manifest")
    return Run(folder, facts["manifest"], methods, options)


def read_option(config: DictConfig, name: str) -> Any:
    """A value of a run's configuration as it is written; None where there is none."""
    node: Any = OmegaConf.to_container(config, resolve=False)
    for key in name.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node


def list_runs(folder: Path) -> list[Path]:
    """The finished runs ``<name>/<timestamp>`` below ``folder`` that measured something, the newest first."""
    runs = [file.parent for file in folder.glob("*/*/table.csv") if (file.parent / "provenance.json").is_file()]
    return sorted(runs, key=lambda run: run.name, reverse=True)
