"""The stored outputs of a finished comparison, read again without any network."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf

from harmony.cli.compose import load_yaml
from harmony.core.errors import UserError
from harmony.core.foreign import read_json
from harmony.data.manifest import manifest_hash
from harmony.evaluation.blocks import outputs_of
from harmony.evaluation.eval_sets import (
    EXEMPLAR,
    RELIGHT,
    EvalSet,
    degrade,
    load_reconstruct,
    load_relight,
    paste_outputs,
)
from harmony.evaluation.figures import scores
from harmony.metrics.fidelity import limit


class Known(NamedTuple):
    """A method of which no more is known than what its outputs are called by."""

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
    """What a run folder says of its comparison."""

    folder: Path
    config: DictConfig
    facts: dict[str, Any]

    @property
    def rows(self) -> list[str]:
        return list(self.facts["methods"])

    def find_manifest(self, more: Iterable[Path] = ()) -> Path:
        """The manifest that the run measured on; ``more``: where else it may lie. UserError if it is not there."""
        work = Path(str(OmegaConf.select(self.config, "paths.work", default="work")))
        name = str(OmegaConf.select(self.config, "dataset.name"))
        places = [place / work / name / "manifest.jsonl" for place in (Path(), *self.folder.parents[2:3])]
        for place in (*more, *places):
            if place.is_file() and manifest_hash(place) == self.facts["manifest"]:
                return place
        raise UserError(
            f"{self.folder} measured on dataset {name} as it no longer is in {places[0].parent}: evaluate again"
        )

    def read(self, manifest: Path, rows: Iterable[str] | None = None) -> RunOutputs:
        """Its outputs of ``rows``, or of all. UserError where one is missing."""
        config, prints = self.config, self.facts["methods"]
        rows = list(prints) if rows is None else list(rows)
        if unknown_rows := [row for row in rows if row not in prints]:
            raise UserError(f"{self.folder} has no row {unknown_rows[0]}; it has {', '.join(prints)}")
        options = config.study
        at = manifest, config.split, self.find_resolution()
        if options.eval_set == RELIGHT:
            items = load_relight(*at, config.limit, radius=options.radius)
        else:
            items = load_reconstruct(*at, config.limit)
        items = items if options.degrade[0] == 1 else degrade(items, options.degrade[0])
        pictures = {row: paste_outputs(items, self.read_raw(items, row)) for row in rows}
        return RunOutputs(self.folder, items, pictures)

    def read_raw(self, items: EvalSet, row: str) -> list[np.ndarray]:
        """The outputs of a row as the method gave them."""
        try:
            return outputs_of(items, Known(self.facts["methods"][row]), self.folder, self.config.seed)
        except (OSError, ValueError):
            raise UserError(f"{self.folder} lacks outputs of {row}: evaluate again") from None

    def find_resolution(self) -> int:
        """The side of its outputs in pixels."""
        for place in self.facts["methods"].values():
            for file in sorted((self.folder / "outputs" / place[:16]).rglob("*.npy")):
                return np.load(file, mmap_mode="r").shape[1]
        raise UserError(f"{self.folder} holds no outputs any more: evaluate again")


def open_run(folder: Path) -> Run:
    """The run in ``folder``. UserError unless it is a finished comparison of composites that have truths."""
    remedy = "give the folder of a finished comparison, such as evaluate experiment=table1 leaves"
    if not (folder / "provenance.json").is_file() or not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no finished run there; {remedy}")
    facts, config = read_json(folder / "provenance.json"), load_yaml(folder / "config.yaml")
    kind = OmegaConf.select(config, "study.eval_set")
    if not isinstance(facts, dict) or kind is None or not isinstance(facts.get("methods"), dict):
        raise UserError(f"{folder}: no comparison of methods; {remedy}")
    if kind == EXEMPLAR:
        raise UserError(f"{folder}: its composites have no truths; {remedy}")
    return Run(folder, config, facts)


def list_runs(folder: Path) -> list[Path]:
    """The finished runs ``<name>/<timestamp>`` below ``folder`` that measured something, the newest first."""
    runs = [file.parent for file in folder.glob("*/*/table.csv") if (file.parent / "provenance.json").is_file()]
    return sorted(runs, key=lambda run: run.name, reverse=True)
