"""The bench of judges: how well an evaluator tells photographs from the same with their object in another light."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harmony.core.errors import UserError
from harmony.core.progress import tell
from harmony.data.judge_data import Composites
from harmony.data.manifest import manifest_hash
from harmony.evaluation.eval_sets import subsample
from harmony.evaluation.pages import ROWS, PageRow
from harmony.evaluation.report import Report
from harmony.evaluation.study import Study, StudyRun
from harmony.evaluation.tables import flat, pictures, write_table
from harmony.metrics.classification import classification_metrics
from harmony.models.judge import judge_hash, load_evaluator
from harmony.pixels.images import from_model

SHOWN = 8  # pairs on the figure
LIGHTS = ("another light", "as it was taken")  # the two pictures of a pair, by their label


@dataclass
class JudgeStudy(Study):
    """The study of ``experiment=judge_bench``, for any dataset with one object a picture.

    ``evaluators``: row -> ``statistic``, a judge (run, folder or shipped name), or None for one that is left out.
    """

    run: StudyRun
    evaluators: dict[str, str | None]

    def __post_init__(self) -> None:
        self.notes = [
            f"{row}: left out, give study.evaluators.{row}=RUN" for row, at in self.evaluators.items() if not at
        ]
        self.evaluators = {row: at for row, at in self.evaluators.items() if at}
        if not self.evaluators:
            raise UserError(f"{self.run.name} has nothing to compare: {'; '.join(self.notes)}")

    def measure(self) -> Report:
        """Figures of every evaluator, their table and a picture; all is done by the first process."""
        run = self.run
        if run.rank > 0:
            return Report()
        judges = {row: load_evaluator(at, run.backbone.device) for row, at in self.evaluators.items()}
        side = run.backbone.resolution
        composites = Composites(run.manifest, run.split, side, "center", run.seed)
        indices = subsample(list(range(len(composites))), run.limit)
        items, ids = [composites[i, i] for i in indices], [composites.ids[i] for i in indices]
        pairs = [([from_model(x) for x in item["image"]], item["mask"][0, 0].numpy() > 0) for item in items]
        labels, table, scores = np.tile([0.0, 1.0], len(pairs)), {}, {}
        for row, judge in judges.items():
            scores[row] = np.array([judge(image, mask) for images, mask in pairs for image in images])
            table[row] = {
                f"{run.split}/{name}": value for name, value in classification_metrics(scores[row], labels).items()
            }
            tell(f"{run.name}: {row}, {len(pairs)} pairs")
        line = f"{run.name}: n = {len(pairs)} {run.split} pairs of {run.manifest.parent.name} at {side} px"
        notes = [f"{line}, seed {run.seed}; a pair: as it was taken, its object under another light", *self.notes]
        text = write_table(run.folder, table, "method", notes, every=True)
        few, row = subsample(list(range(len(pairs))), SHOWN), next(reversed(scores))
        titles = [f"{scores[row][2 * i]:.2f} / {scores[row][2 * i + 1]:.2f}" for i in few]
        figure = run.folder / "figure.png"
        pictures(figure, [[pairs[i][0][label] for i in few] for label in (0, 1)], titles)
        facts = {"count": len(pairs), "made_of": {row: judge_hash(at) for row, at in self.evaluators.items()}}
        rows = [page_row(i, ids[i], pairs[i][0], scores) for i in subsample(list(range(len(pairs))), ROWS)]
        samples = {
            key: {
                f"{row}/{light}": float(each[2 * i + n])
                for row, each in scores.items()
                for n, light in enumerate(LIGHTS)
            }
            for i, key in enumerate(ids)
        }
        facts |= {"manifest": manifest_hash(run.manifest)}
        return Report(flat(table), facts, text, [figure], rows, samples)


def page_row(i: int, key: str, images: Sequence[np.ndarray], scores: dict[str, np.ndarray]) -> PageRow:
    """Pair ``i``, of the photograph ``key``, for the page: named by what each evaluator thinks of its two pictures."""
    opinions = [f"{row} {each[2 * i]:.2f} and {each[2 * i + 1]:.2f}" for row, each in scores.items()]
    title = f"pair {i + 1}, natural by {', '.join(opinions)}"
    return PageRow(title, dict(zip(LIGHTS, images, strict=True)), key)
