"""Studies: what ``evaluate`` measures. A study is one file here and one option file in ``configs/study``."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harmony.core.errors import UserError
from harmony.evaluation.report import Report
from harmony.methods.method import Method
from harmony.models.backbone import Backbone
from harmony.models.clip import clip_of
from harmony.models.perception import PairMetric, load_metrics
from harmony.sampling.guidance import Settings


@dataclass
class StudyRun:
    """One run of a study: everything that it needs beside its own options.

    ``prepare`` returns the dataset's manifest (of an editing dataset its ``edits.jsonl``) and ``load`` the backbone;
    each is called once, when a study first asks. ``build`` turns options of a row into a method, ``method`` is the
    method of the command line. ``protocol`` says in words how pictures are sampled. ``clip`` is open_clip's
    NAME/WEIGHTS (None: the backbone's towers), ``weights`` those of further metrics by name. Of ``world`` processes
    each makes its share of the outputs, on its ``device``; the first one reports.
    """

    name: str
    folder: Path
    split: str = "test"
    limit: int | None = None
    seed: int = 0
    settings: Settings = field(default_factory=Settings)
    protocol: str = ""
    clip: str | None = None
    evaluator: str | None = None
    weights: Mapping[str, str | None] = field(default_factory=dict)
    rank: int = 0
    world: int = 1
    device: str = "cpu"
    prepare: Callable[[], Path] | None = None
    load: Callable[[], Backbone] | None = None
    build: Callable[[Mapping[str, Any]], Method] | None = None
    method: Callable[[], Method] | None = None

    @cached_property
    def manifest(self) -> Path:
        return self.prepare()

    @cached_property
    def backbone(self) -> Backbone:
        return self.load()

    @cached_property
    def embedder(self) -> Any:
        """The CLIP model of this run; None where there is none."""
        return clip_of(self.backbone, self.clip)

    @cached_property
    def metrics(self) -> tuple[list[PairMetric], list[str]]:
        """The further metrics, and a line for each whose weights cannot be had."""
        return load_metrics(self.weights, self.backbone.device) if any(self.weights.values()) else ([], [])


class Study(ABC):
    """A study of one run; its constructor checks the options, ``configs/study/NAME.yaml`` as keywords."""

    run: StudyRun

    @abstractmethod
    def measure(self) -> Report:
        """The report; an empty one on other processes than the first."""

    def write_inputs(self, folder: Path) -> None:
        """Write what another program needs to take part: ``composites``, ``masks`` and more, each as NAME.png.

        Its results, NAME.png again, are measured by the method ``stored``. UserError for a study without composites.
        """
        raise UserError(f"{self.run.name} has no composites that another program could take: leave out inputs=")
