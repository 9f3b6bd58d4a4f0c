"""One trained network before and after: the figures of a baseline beside those of a method, as a training ends."""

from collections.abc import Sequence

import numpy as np

from harmony.core.progress import Progress, tell
from harmony.evaluation.eval_sets import EvalSet, enough
from harmony.evaluation.figures import Fidelity
from harmony.methods.method import Method, make_seeds
from harmony.models.backbone import Backbone
from harmony.models.clip import clip_of
from harmony.models.features import feature_extractor

CHUNK = 32  # pictures between two lines of progress
SHOWN = ("color_de", "fpsnr", "psnr", "edge_f1", "fid", "kid", "seam", "bg_drift")


def fill_set(items: EvalSet, method: Method, seed: int, what: str) -> list[np.ndarray]:
    """The outputs of a method, with a line of progress now and then."""
    outputs, progress = [], Progress(what, len(items), "pictures")
    for i in range(0, len(items), CHUNK):
        indices = list(range(i, min(i + CHUNK, len(items))))
        outputs += method.fill([items.composites[n] for n in indices], make_seeds(seed, indices))
        progress.advance(len(indices))
    return outputs


def before_and_after(
    backbone: Backbone, items: EvalSet, before: Method, after: Method, seed: int, protocol: str, clip: str | None = None
) -> tuple[dict[str, float], dict]:
    """(figures of ``after`` and, under ``baseline/``, of ``before``; ``protocol`` and ``count`` behind them).

    ``protocol`` says how both are sampled; ``clip``: see ``clip_of``.
    """
    fidelity = Fidelity(enough(items), feature_extractor(backbone), clip_of(backbone, clip))
    tell(f"evaluating on {len(items)} {items.name} pictures, before and after: {protocol}; fid on {fidelity.protocol}")
    old, new = (
        fidelity.figures(fill_set(items, method, seed, what)) for what, method in (("before", before), ("after", after))
    )
    facts = {"protocol": fidelity.protocol, "count": len(items)}
    return {f"baseline/{name}": value for name, value in old.items()} | new, facts


def table(metrics: dict[str, float], split: str, protocol: str, count: int) -> str:
    """Before and after as a Markdown table; below it the number of pictures and the features of fid and kid."""
    lines = ["| metric | before | after | change |", "|---|---|---|---|"]
    for name in [f"{split}/pasted/{m}" for m in SHOWN] + [f"{split}/raw/bg_drift"]:
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
