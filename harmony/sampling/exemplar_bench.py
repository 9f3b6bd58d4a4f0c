"""F3. A bench for painting by example, after COCOEE (method sheet 3.10): another object of the same kind as exemplar.

Each source picture has one box, which is painted over; the exemplar is the crop of the most similar object of the same
label in another picture of the split, by the cosine of CLIP image features. There is no truth: what counts is whether
the box looks like the exemplar (``clip_i``), whether the picture looks like a picture (``fid``, ``qs_own``), and
whether pixels were merely copied (``copying``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from harmony.errors import UserError
from harmony.exemplars import exemplar
from harmony.images import resize
from harmony.masks import bounding_box, box_mask
from harmony.metrics.fidelity import aggregate, bg_drift
from harmony.metrics.frechet import extract
from harmony.sampling.benchmark import Bench, distances, pasted, spread

COMPONENTS = 20  # of the Gaussian mixture behind qs_own


def exemplar_bench(
    bench: Bench, labels: Sequence[str], extractor: Callable, limit: int | None = None, say: Callable = print
) -> Bench:
    """Up to ``limit`` pictures of ``bench`` whose label occurs in another one, and the most similar object there.

    ``labels`` are those of the examples. UserError when no label occurs twice.
    """
    crops = [exemplar(e.image, e.mask, extractor.size) for e in bench.examples]
    features = F.normalize(extract(crops, extractor, extractor.size), dim=1)
    alike = (features @ features.T).numpy()
    same = np.array(labels)[:, None] == np.array(labels)[None]
    np.fill_diagonal(same, False)
    kept = np.flatnonzero(same.any(1)).tolist()
    if not kept:
        raise UserError(f"no label occurs twice among {len(labels)} {bench.name} pictures: take a larger dataset")
    if len(kept) < len(labels):
        say(f"{len(labels) - len(kept)} of {len(labels)} pictures left out: no other one shows their kind of object")
    kept = spread(kept, limit)
    chosen = np.where(same, alike, -np.inf).argmax(1)
    part = bench.part(kept)
    examples = [replace(e, hole=box_mask(bounding_box(e.mask), *e.mask.shape[::-1])) for e in part.examples]
    return replace(part, examples=examples, exemplars=[crops[chosen[i]] for i in kept])


def box_of(image: np.ndarray, hole: np.ndarray, size: int) -> np.ndarray:
    """The painted box of a result, squashed to ``size`` x ``size`` like an exemplar."""
    x0, y0, x1, y1 = bounding_box(hole)
    return resize(image[y0:y1, x0:x1], size, size)


def copying(result: np.ndarray, shown: np.ndarray) -> float:
    """Correlation in [-1, 1] of the pixels of two squares of one size; 1 = copied. 0 for a flat one."""
    a, b = (x.astype(np.float64) - x.mean((0, 1)) for x in (result, shown))
    return float((a * b).sum() / max(np.sqrt((a**2).sum() * (b**2).sum()), 1e-9))


class Quality:
    """Own quality score: the log-likelihood of a picture's features under a mixture of Gaussians fitted on ``real``.

    The released score (QS) maps the log-likelihood of a mixture of 20 Gaussians, fitted on COCO, from [0, 300] to
    [0, 1]; that mixture is a download. Here 20 diagonal ones are fitted on one half of ``real``, and the figure is a
    rank: the percentage of the other half that is less likely. 50 = like a picture of the set.
    """

    def __init__(self, real: torch.Tensor, seed: int = 0):
        from sklearn.mixture import GaussianMixture

        order = np.random.default_rng(seed).permutation(len(real))
        fitted, held = real.numpy()[order[::2]], real.numpy()[order[1::2]]
        count = max(1, min(COMPONENTS, len(fitted) // 4))
        self.mixture = GaussianMixture(count, covariance_type="diag", reg_covar=1e-3, random_state=seed).fit(fitted)
        self.held = np.sort(self.mixture.score_samples(held))

    def __call__(self, features: torch.Tensor) -> float:
        """Mean over N x D features, 0..100."""
        ranks = np.searchsorted(self.held, self.mixture.score_samples(features.numpy())) / len(self.held)
        return float(100 * ranks.mean())


@dataclass(frozen=True)
class Likeness:
    """The figures of this bench: ``real`` are pictures of the train split."""

    bench: Bench
    extractor: Callable
    real: list[np.ndarray]

    @cached_property
    def real_features(self) -> torch.Tensor:
        return extract(self.real, self.extractor, self.extractor.size)

    @cached_property
    def quality(self) -> Quality:
        return Quality(self.real_features)

    @cached_property
    def exemplar_features(self) -> torch.Tensor:
        return extract(self.bench.exemplars, self.extractor, self.extractor.size)

    def figures(self, raw: Sequence[np.ndarray]) -> dict[str, float]:
        """``<split>/raw/<metric>`` and ``<split>/pasted/<metric>``."""
        bench, size, results = self.bench, self.extractor.size, {}
        for kind, outputs in (("raw", list(raw)), ("pasted", pasted(bench, raw))):
            holes = [e.hole for e in bench.examples]
            boxes = [box_of(y, h, size) for y, h in zip(outputs, holes, strict=True)]
            shown = [resize(e, size, size) for e in bench.exemplars]
            numbers = aggregate(
                [
                    {"bg_drift": bg_drift(y, x, h), "copying": copying(b, s)}
                    for y, x, h, b, s in zip(outputs, bench.seen(), holes, boxes, shown, strict=True)
                ]
            )
            cosine = F.cosine_similarity(extract(boxes, self.extractor, size), self.exemplar_features)
            features = extract(outputs, self.extractor, size)
            numbers |= {"clip_i": 100 * float(cosine.mean()), "qs_own": self.quality(features)}
            numbers |= distances(features, self.real_features)
            results |= {f"{bench.name}/{kind}/{name}": float(value) for name, value in numbers.items()}
        return results
