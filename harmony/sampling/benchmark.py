"""F3. The reconstruction benchmark: the instance's own photograph is the truth (section 2.9, situation 1).

Hole and hints come from the same photograph, sampling starts from pure noise; every method sees the same pictures,
holes and noise. Figures are given for the raw output and after paste-back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harmony.composites import paste_back
from harmony.data.latents import Example, Recipe, example
from harmony.data.manifest import read_manifest
from harmony.metrics.fidelity import aggregate, image_metrics
from harmony.metrics.frechet import KitFeatures, Statistics, extract, frechet_distance, inception_features, kid
from harmony.models.kit import Kit
from harmony.sampling.harmonize import Branch, Settings, fill

KID_BELOW = 2048  # with fewer images the covariance is singular: the kernel distance is reported too


@dataclass(frozen=True)
class Bench:
    """Examples of one split at the kit's resolution, with their captions; ``name`` is the split."""

    name: str
    examples: list[Example]
    prompts: list[str]


def load_bench(manifest: Path, split: str, resolution: int, limit: int | None = None) -> Bench:
    """The test protocol (centre crop, dilated hole) of up to ``limit`` rows, spread evenly over the split."""
    rows = read_manifest(manifest, split)[1]
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, limit).round().astype(int)]
    return Bench(
        split, [example(r, Path(manifest).parent, Recipe(), resolution) for r in rows], [r.caption for r in rows]
    )


def reconstruct(kit: Kit, bench: Bench, branches: Sequence[Branch], settings: Settings) -> list[np.ndarray]:
    """Raw outputs, uint8 R x R x 3, in the order of the bench."""
    e = bench.examples
    images, masks, holes = [v.image for v in e], [v.mask for v in e], [v.hole for v in e]
    return fill(kit, images, images, masks, holes, bench.prompts, branches, settings)


def figures(bench: Bench, raw: Sequence[np.ndarray], extractor: Callable) -> dict[str, float]:
    """``<split>/raw/<metric>`` and ``<split>/pasted/<metric>`` for all metrics of the design; means over images."""
    pasted = [paste_back(y, e.image, e.hole) for y, e in zip(raw, bench.examples, strict=True)]
    truth = extract([e.image for e in bench.examples], extractor, extractor.size)
    results = {}
    for kind, outputs in (("raw", raw), ("pasted", pasted)):
        each = [image_metrics(y, e.image, e.mask, e.hole) for y, e in zip(outputs, bench.examples, strict=True)]
        numbers = aggregate(each)
        made = extract(list(outputs), extractor, extractor.size)
        numbers["fid"] = frechet_distance(*(Statistics(f.shape[1]).update(f) for f in (made, truth)))
        if len(raw) < KID_BELOW:
            numbers["kid"] = kid(made, truth, subset_size=min(1000, len(raw)))
        results |= {f"{bench.name}/{kind}/{name}": float(value) for name, value in numbers.items()}
    return results


def feature_extractor(kit: Kit) -> Callable:
    """clean-fid's Inception where its weights lie on disk, else the kit's CLIP tower; ``.protocol`` names which."""
    return inception_features() or KitFeatures(kit.image_encoder)


def before_and_after(
    kit: Kit,
    manifest: Path,
    branches: Sequence[Branch],
    split: str = "test",
    limit: int | None = None,
    steps: int = 50,
    guidance: float = 7.5,
    seed: int = 0,
) -> tuple[dict[str, float], dict]:
    """(figures with the ControlNets and, under ``baseline/``, with weight 0; ``protocol`` and ``count`` behind them).

    ``protocol`` is the feature extractor of fid and kid, ``count`` the number of pictures.
    """
    bench = load_bench(manifest, split, kit.resolution, limit)
    settings = Settings(steps, guidance, seed)
    extractor = feature_extractor(kit)
    name = Path(manifest).parent.name
    print(
        f"evaluating on {len(bench.examples)} {split} pictures of {name}, without and with the ControlNet: "
        f"DDIM {steps} steps, guidance {guidance}, seed {seed}; fid and kid on {extractor.protocol} features",
        flush=True,
    )
    before = figures(bench, reconstruct(kit, bench, [], settings), extractor)
    after = figures(bench, reconstruct(kit, bench, branches, settings), extractor)
    facts = {"protocol": extractor.protocol, "count": len(bench.examples)}
    return {f"baseline/{name}": value for name, value in before.items()} | after, facts


SHOWN = ("color_de", "fpsnr", "psnr", "edge_f1", "fid", "kid", "seam", "bg_drift")


def table(metrics: dict[str, float], split: str, protocol: str, count: int) -> str:
    """Before and after as a Markdown table; below it the number of pictures and the features of fid and kid."""
    lines = ["| metric | before (hint off) | after | change |", "|---|---|---|---|"]
    for name in [f"{split}/pasted/{m}" for m in SHOWN] + [f"{split}/raw/bg_drift"]:
        if name in metrics:
            old, new = metrics[f"baseline/{name}"], metrics[name]
            change = f"{100 * (new - old) / old:+.1f} %" if old else ""
            lines.append(f"| {name} | {old:.4g} | {new:.4g} | {change} |")
    return "\n".join([*lines, "", f"n = {count}; fid and kid on features of {protocol}"])
