"""The bench of judges: how well an evaluator tells photographs from the same with their object in another light."""

from pathlib import Path

import numpy as np
import torch

from harmony.core.errors import UserError
from harmony.core.files import write_text
from harmony.core.progress import tell
from harmony.data.judge_data import Composites
from harmony.data.manifest import manifest_hash
from harmony.evaluation.eval_sets import subsample
from harmony.evaluation.report import Report
from harmony.evaluation.tables import pictures, to_csv, to_markdown
from harmony.metrics.classification import classification_metrics
from harmony.models.judge import judge_hash, load_evaluator
from harmony.pixels.images import from_model

SHOWN = 8  # pairs on the figure


class JudgeStudy:
    """The study of ``experiment=judge_bench``, with the interface of ``Comparison``, for any dataset.

    ``evaluators``: row -> ``statistic``, a judge (run, folder or shipped name), or None for one that is left out.
    ``side``: of the squares; ``limit``: pairs at most.
    """

    def __init__(
        self,
        name: str,
        evaluators: dict[str, str | None],
        manifest: Path,
        folder: Path,
        split: str,
        side: int,
        limit: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.name, self.manifest, self.folder, self.split, self.limit = name, manifest, folder, split, limit
        self.side, self.seed, self.device = side, seed, device
        self.notes = [f"{row}: left out, give study.evaluators.{row}=RUN" for row, at in evaluators.items() if not at]
        self.evaluators = {row: at for row, at in evaluators.items() if at}
        if not self.evaluators:
            raise UserError(f"{name} has nothing to compare: {'; '.join(self.notes)}")

    def measure(self) -> Report:
        """Figures of every evaluator, their table and a picture."""
        scores = {row: load_evaluator(at, self.device) for row, at in self.evaluators.items()}
        composites = Composites(self.manifest, self.split, self.side, "centre", self.seed)
        drawn = [composites[i, i] for i in subsample(list(range(len(composites))), self.limit)]
        pairs = [([from_model(x) for x in item["image"]], item["mask"][0, 0].numpy() > 0) for item in drawn]
        labels, table, found = np.tile([0.0, 1.0], len(pairs)), {}, {}
        for row, score in scores.items():
            found[row] = np.array([score(image, mask) for images, mask in pairs for image in images])
            table[row] = {
                f"{self.split}/{name}": value for name, value in classification_metrics(found[row], labels).items()
            }
            tell(f"{self.name}: {row}, {len(pairs)} pairs")
        line = f"{self.name}: n = {len(pairs)} {self.split} pairs of {self.manifest.parent.name} at {self.side} px"
        notes = [f"{line}, seed {self.seed}; a pair: as it was taken, its object under another light", *self.notes]
        text = to_markdown(table, "method", notes, every=True)
        write_text(self.folder / "table.csv", to_csv(table, "method"))
        write_text(self.folder / "table.md", text)
        few, row = subsample(list(range(len(pairs))), SHOWN), next(reversed(found))
        titles = [f"{found[row][2 * i]:.2f} / {found[row][2 * i + 1]:.2f}" for i in few]
        figure = self.folder / "figure.png"
        pictures(figure, [[pairs[i][0][label] for i in few] for label in (0, 1)], titles)
        facts = {"count": len(pairs), "made_of": {row: judge_hash(at) for row, at in self.evaluators.items()}}
        flat = {f"{row}/{name}": value for row, numbers in table.items() for name, value in numbers.items()}
        return Report(flat, facts | {"manifest": manifest_hash(self.manifest)}, text, [figure])
