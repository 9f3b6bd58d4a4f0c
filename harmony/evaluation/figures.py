"""The figures of a method's outputs on an eval set: raw and after paste-back, means over pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from harmony.evaluation.eval_sets import EvalSet, paste_outputs
from harmony.metrics.alignment import shift
from harmony.metrics.fidelity import aggregate, bg_drift, image_metrics, sharpness
from harmony.metrics.frechet import Statistics, extract, frechet_distance, kid
from harmony.metrics.similarity import Clip, cosines, crop_to_box, embeddings
from harmony.models.perception import PairMetric

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
class Figures:
    """What a method's outputs measure: ``means`` over pictures, ``<split>/<kind>/<metric>``, and the ``rows`` of the
    single pictures after paste-back, metric -> figure.
    """

    means: dict[str, float]
    rows: list[dict[str, float]]


@dataclass(frozen=True)
class Fidelity:
    """All figures for outputs on ``items``; without a ``clip`` there is no ``clip_i`` and ``clip_t``.

    ``metrics``: further ones, whose weights come from elsewhere.
    """

    items: EvalSet
    extractor: Callable
    clip: Clip | None = None
    metrics: Sequence[PairMetric] = ()

    @property
    def protocol(self) -> str:
        """What features fid, kid and the CLIP scores are made of, and how further metrics are measured."""
        clip = f", clip on {self.clip.name} embeddings" if self.clip else ""
        return "; ".join([f"{self.extractor.protocol} features{clip}", *(metric.protocol for metric in self.metrics)])

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

    def rows(self, outputs: Sequence[np.ndarray]) -> list[dict[str, float]]:
        """The figures of each picture."""
        rows, columns = scores(self.items, outputs), {}
        if self.clip is not None:  # times 100, as the field prints them
            looks = embeddings(self.boxes(outputs), self.clip), embeddings(outputs, self.clip)
            pairs = {"clip_i": (looks[0], self.objects), "clip_t": (looks[1], self.words)}
            columns = {name: [100 * cosine for cosine in cosines(*pair)] for name, pair in pairs.items()}
        masks = [c.mask for c in self.items.composites]
        columns |= {metric.name: metric(outputs, self.items.truths, masks) for metric in self.metrics}
        return [row | {name: values[n] for name, values in columns.items()} for n, row in enumerate(rows)]

    def measure(self, raw: Sequence[np.ndarray]) -> Figures:
        """The figures of a method's outputs, raw and after paste-back; ``shift`` is of the raw ones."""
        items, means = self.items, {}
        for kind, outputs in (("raw", list(raw)), ("pasted", paste_outputs(items, raw))):
            rows = self.rows(outputs)
            numbers = aggregate(rows)
            if kind == "raw":
                composites = zip(outputs, items.composites, strict=True)
                numbers |= aggregate([{"shift": shift(y, c.background, c.hole)} for y, c in composites])
            numbers |= distances(extract(outputs, self.extractor, self.extractor.size), self.real)
            means |= {f"{items.name}/{kind}/{name}": float(value) for name, value in numbers.items()}
        return Figures(means, rows)


def list_samples(
    ids: Sequence[str], captions: Sequence[str], rows_of: Mapping[str, Sequence[Mapping[str, float]]]
) -> dict[str, dict]:
    """The ``samples`` of a report: of each id its caption and its figures, ``rows_of`` the methods (method -> rows)."""
    samples = {}
    for n, (key, caption) in enumerate(zip(ids, captions, strict=True)):
        figures = {f"{name}/{metric}": value for name, rows in rows_of.items() for metric, value in rows[n].items()}
        samples[key] = {"caption": caption, **figures}
    return samples


def distances(outputs: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    """``fid`` of features N x D and M x D, and with few images ``kid`` too."""
    results = {"fid": frechet_distance(*(Statistics(f.shape[1]).update(f) for f in (outputs, real)))}
    if len(outputs) < KID_BELOW:
        results["kid"] = kid(outputs, real, subset_size=min(1000, len(outputs), len(real)))
    return results
