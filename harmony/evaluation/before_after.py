"""One method before and after: its figures beside those of a baseline, as a training ends and as a study."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harmony.core.files import write_text
from harmony.core.progress import Progress, tell
from harmony.data.manifest import manifest_hash
from harmony.evaluation.eval_sets import (
    EvalSet,
    enough,
    load_reconstruct,
    paste_outputs,
    sample_grid,
    subsample,
    with_holes,
)
from harmony.evaluation.figures import Fidelity, list_samples
from harmony.evaluation.pages import ROWS, PageRow, by_row
from harmony.evaluation.report import Report
from harmony.evaluation.study import Study, StudyRun
from harmony.methods.method import Method, make_seeds
from harmony.models.backbone import Backbone
from harmony.models.clip import clip_of
from harmony.models.features import feature_extractor
from harmony.models.perception import METRICS, PairMetric
from harmony.pixels.images import write_image

CHUNK = 32  # pictures between two lines of progress
SHOWN = ("color_de", "fpsnr", "psnr", "edge_f1", *METRICS, "fid", "kid", "seam", "bg_drift")


def fill_set(items: EvalSet, method: Method, seed: int, what: str) -> list[np.ndarray]:
    """The outputs of a method, with a line of progress now and then."""
    outputs, progress = [], Progress(what, len(items), "pictures")
    for i in range(0, len(items), CHUNK):
        indices = list(range(i, min(i + CHUNK, len(items))))
        outputs += method.fill([items.composites[n] for n in indices], make_seeds(seed, indices))
        progress.advance(len(indices))
    return outputs


@dataclass(frozen=True)
class Outcome:
    """Figures of a method and, under ``baseline/``, of its baseline; the ``facts`` behind them; the outputs of both.

    ``samples``: see ``Report``.
    """

    figures: dict[str, float]
    facts: dict
    samples: dict[str, dict[str, float | str]]
    before: list[np.ndarray]
    after: list[np.ndarray]


def before_and_after(
    backbone: Backbone,
    items: EvalSet,
    before: Method,
    after: Method,
    seed: int,
    protocol: str,
    clip: str | None = None,
    metrics: Sequence[PairMetric] = (),
) -> Outcome:
    """Fill ``items`` with two methods and measure both.

    ``protocol`` says how both are sampled; ``clip``: see ``clip_of``; ``metrics``: further ones.
    """
    fidelity = Fidelity(enough(items), feature_extractor(backbone), clip_of(backbone, clip), metrics)
    tell(f"evaluating on {len(items)} {items.name} pictures, before and after: {protocol}; fid on {fidelity.protocol}")
    outputs = [fill_set(items, method, seed, what) for what, method in (("before", before), ("after", after))]
    old, new = (fidelity.measure(images) for images in outputs)
    samples = list_samples(items.names, items.captions, {"baseline": old.rows, "output": new.rows})
    facts = {"protocol": fidelity.protocol, "count": len(items)}
    figures = {f"baseline/{name}": value for name, value in old.means.items()} | new.means
    return Outcome(figures, facts, samples, *outputs)


def table(metrics: dict[str, float], split: str, protocol: str, count: int) -> str:
    """Before and after as a Markdown table; below it the number of pictures and the features of fid and kid."""
    lines = ["| metric | before | after | change |", "|---|---|---|---|"]
    for name in [f"{split}/pasted/{m}" for m in SHOWN] + [f"{split}/raw/{m}" for m in ("bg_drift", "shift")]:
        if name in metrics:
            old, new = metrics[f"baseline/{name}"], metrics[name]
            change = "" if old <= 0 or name.endswith("kid") else f"{100 * (new - old) / old:+.1f} %"  # kid is about 0
            lines.append(f"| {name} | {old:.4g} | {new:.4g} | {change} |")
    return "\n".join([*lines, "", f"n = {count}; fid and kid on {protocol}"])


def views_and_outputs(
    items: EvalSet, baseline: Sequence[np.ndarray], method: Method, outputs: Sequence[np.ndarray]
) -> dict[str, list[np.ndarray]]:
    """The columns of a grid: what the networks see, the baseline, the output."""
    return {**method.views(items.composites), "baseline": list(baseline), "output": list(outputs)}


def page_rows(items: EvalSet, method: Method, outcome: Outcome) -> list[PageRow]:
    """The rows of a page: some of the items with what the networks see, the baseline, the output and the truth.

    Outputs are pasted back, as most figures of the page are of them.
    """
    few = subsample(list(range(len(items))), ROWS)
    part = items.part(few)
    off, on = (paste_outputs(part, [outputs[i] for i in few]) for outputs in (outcome.before, outcome.after))
    columns = {"input": with_holes(part), **views_and_outputs(part, off, method, on), "truth": part.truths}
    return by_row(part.names, part.captions, columns)


@dataclass
class BeforeAfter(Study):
    """The method of the command line beside inpainting by words alone."""

    run: StudyRun
    shown: int

    def measure(self) -> Report:
        """The report, with a grid of ``shown`` pictures; all is done by the first process."""
        run = self.run
        if run.rank > 0:
            return Report()
        method, baseline = run.method(), run.build({"method": "inpainting"})
        items = load_reconstruct(run.manifest, run.split, run.backbone.resolution, run.limit)
        metrics, lines = run.metrics
        outcome = before_and_after(run.backbone, items, baseline, method, run.seed, run.protocol, run.clip, metrics)
        few = subsample(list(range(len(items))), self.shown)
        off, on = ([outputs[i] for i in few] for outputs in (outcome.before, outcome.after))
        picture = run.folder / "grids" / "samples.png"
        picture.parent.mkdir(exist_ok=True)
        part = items.part(few)
        write_image(picture, sample_grid(part, views_and_outputs(part, off, method, on)))
        text = "\n".join([table(outcome.figures, run.split, **outcome.facts), *lines]) + "\n"
        write_text(run.folder / "table.md", text)
        facts = outcome.facts | {"manifest": manifest_hash(run.manifest)}
        rows = page_rows(items, method, outcome)
        return Report(outcome.figures, facts, text, [picture], rows, outcome.samples)
