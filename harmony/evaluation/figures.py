"""The figures of a method's outputs on an eval set: raw and after paste-back, means over pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from harmony.evaluation.eval_sets import EvalSet, paste_outputs
from harmony.metrics.fidelity import aggregate, bg_drift, image_metrics, sharpness
from harmony.metrics.frechet import Statistics, extract, frechet_distance, kid
from harmony.metrics.similarity import Clip, clip_i, clip_t, crop_to_box, embeddings

KID_BELOW = 2048  # with fewer images the covariance is singular: the kernel distance is reported too


def scores(items: EvalSet, outputs: Sequence[np.ndarray]) -> list[dict[str, float]]:
    """The figures of each output against its truth; ``bg_drift`` is against what the method was given."""
    shadows = items.shadows or [None] * len(items)
    results = []
    for y, c, truth, shadow in zip(outputs, items.composites, items.truths, shadows, strict=True):
        numbers = image_metrics(y, truth, c.mask, c.hole, shadow)
        drift, sharp = bg_drift(y, c.background, c.hole), sharpness(y, truth, c.mask)
        results.append(numbers | {"bg_drift": drift, "sharpness": sharp})
    return results


@dataclass(frozen=True)
class Fidelity:
    """All figures for outputs on ``items``; without a ``clip`` there is no ``clip_i`` and ``clip_t``."""

    items: EvalSet
    extractor: Callable
    clip: Clip | None = None

    @property
    def protocol(self) -> str:
        """What features fid, kid and the CLIP scores are made of."""
        return f"{self.extractor.protocol} features{f', clip on {self.clip.name} embeddings' if self.clip else ''}"

    @cached_property
    def real(self) -> torch.Tensor:
        """Features N x D of the truths: the other side of every fid on this set."""
        return extract(self.items.truths, self.extractor, self.extractor.size)

    @cached_property
    def objects(self) -> torch.Tensor:
        return embeddings(self.boxes(self.items.truths), self.clip)

    @cached_property
    def words(self) -> torch.Tensor:
        return self.clip.texts(self.items.captions).cpu()

    def boxes(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [crop_to_box(y, c.mask) for y, c in zip(images, self.items.composites, strict=True)]

    def figures(self, raw: Sequence[np.ndarray]) -> dict[str, float]:
        """``<split>/raw/<metric>`` and ``<split>/pasted/<metric>``; means over images."""
        items, results = self.items, {}
        for kind, outputs in (("raw", list(raw)), ("pasted", paste_outputs(items, raw))):
            numbers = aggregate(scores(items, outputs))
            numbers |= distances(extract(outputs, self.extractor, self.extractor.size), self.real)
            if self.clip is not None:  # times 100, as the field prints them
                numbers["clip_i"] = 100 * clip_i(embeddings(self.boxes(outputs), self.clip), self.objects)
                numbers["clip_t"] = 100 * clip_t(embeddings(outputs, self.clip), self.words)
            results |= {f"{items.name}/{kind}/{name}": float(value) for name, value in numbers.items()}
        return results


def distances(outputs: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    """``fid`` of features N x D and M x D, and with few images ``kid`` too."""
    results = {"fid": frechet_distance(*(Statistics(f.shape[1]).update(f) for f in (outputs, real)))}
    if len(outputs) < KID_BELOW:
        results["kid"] = kid(outputs, real, subset_size=min(1000, len(outputs), len(real)))
    return results
