"""A bench for painting by example, after COCOEE (Yang 2022): another object of the same kind as exemplar.

Each source picture has one box, which is painted over; the exemplar is the dataset's own, where it is a bench of
composition, else the crop of the most similar object of the same label in another picture of the split, by the cosine
of CLIP image features. There is no truth: what counts is whether
the box looks like the exemplar (``clip_i``), whether the picture looks like a picture (``clip_fid``, ``fid``,
``qs_own``), and whether pixels were merely copied (``copying``). ``clip_i``, ``clip_fid`` and ``qs_own`` are made of
CLIP's image embeddings, ``fid`` and ``kid`` of the features that the other tables use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from harmony.core.errors import UserError
from harmony.core.progress import tell
from harmony.core.row import Row
from harmony.data.latent_cache import Recipe, example
from harmony.data.manifest import read_manifest
from harmony.evaluation.eval_sets import EXEMPLAR, EvalSet, composite_of, paste_outputs, subsample
from harmony.evaluation.figures import Figures, distances
from harmony.metrics.fidelity import aggregate, bg_drift
from harmony.metrics.frechet import Statistics, extract, frechet_distance
from harmony.metrics.similarity import Clip, cosines, crop_to_box, embeddings
from harmony.pixels.exemplars import cut_out
from harmony.pixels.images import crop_resize, read_image, resize
from harmony.pixels.masks import bounding_box, box_mask, read_mask

COMPONENTS = 20  # of the Gaussian mixture behind qs_own
LARGEST = 0.5  # share of the picture that a box may take


def object_of(row: Row, root: Path) -> np.ndarray:
    """The bare box of a row's object, cut out of the photograph."""
    mask = read_mask(root / row.mask, (row.width, row.height), resize=True)
    return cut_out(read_image(root / row.image), mask, pad=0)


def load_own_exemplars(manifest: Path, split: str, resolution: int, limit: int | None = None) -> EvalSet:
    """Up to ``limit`` rows of a bench of composition, whose exemplars are its own; empty for another dataset.

    The hole is the object's box. The instance is that of the composite, where there is one.
    """
    root, composites, backgrounds = Path(manifest).parent, [], []
    rows = [row for row in read_manifest(manifest, split)[1] if not row.has_truth]
    for row in subsample(rows, limit):
        e = example(row, root, Recipe(), resolution)
        picture = read_image(root / row.extras["composite"]) if "composite" in row.extras else None
        changes = {
            "instance": e.image if picture is None else crop_resize(picture, e.crop, resolution),
            "hole": box_mask(bounding_box(e.mask), *e.mask.shape[::-1]),
            "exemplar": read_image(root / row.extras["exemplar"]),
        }
        composites.append(composite_of(e, row, **changes))
        backgrounds.append(e.image)
    return EvalSet(split, composites, backgrounds, kind=EXEMPLAR)


def load_exemplars(
    items: EvalSet,
    rows: Sequence[Row],
    root: Path,
    clip: Clip,
    limit: int | None = None,
    say: Callable[[str], None] = tell,
) -> EvalSet:
    """``pair_exemplars`` of the photographs of ``rows``, which ``items`` show."""
    crops = [object_of(row, root) for row in rows]
    return pair_exemplars(items, crops, [row.label for row in rows], [row.mask for row in rows], clip, limit, say)


def pair_exemplars(
    items: EvalSet,
    crops: Sequence[np.ndarray],
    labels: Sequence[str],
    objects: Sequence[str],
    clip: Clip,
    limit: int | None = None,
    say: Callable[[str], None] = tell,
) -> EvalSet:
    """Up to ``limit`` pictures of ``items`` whose label occurs in another one, and the most similar object there.

    Of each example: ``crops``, uint8 of any size, the box of its object in the photograph; ``labels``; ``objects``, a
    name that two pictures of one object (a scene under two lights) share. UserError when nothing can be paired.
    """
    boxes = [box_mask(bounding_box(c.mask), *c.mask.shape[::-1]) for c in items.composites]
    features = embeddings(crops, clip)
    similarity = (features @ features.T).numpy()
    labels, objects = np.array(labels), np.array(objects)
    other = (labels[:, None] == labels[None]) & (objects[:, None] != objects[None])
    small = np.array([box.mean() <= LARGEST for box in boxes])
    indices = np.flatnonzero(other.any(1) & small).tolist()
    alone, large = int((~other.any(1)).sum()), int((other.any(1) & ~small).sum())
    if not indices:
        raise UserError(
            f"{items.name}: of {len(boxes)} pictures {alone} show a kind of object that no other one shows and {large} "
            "have a box of more than half of the picture: nothing is left, take a larger dataset"
        )
    if alone or large:
        say(f"of {len(boxes)} pictures {alone} have no other of their kind, {large} a box above half of the picture")
    indices = subsample(indices, limit)
    nearest = np.where(other, similarity, -np.inf).argmax(1)
    composites = [replace(items.composites[i], hole=boxes[i], exemplar=crops[nearest[i]]) for i in indices]
    return replace(items.part(indices), composites=composites, kind=EXEMPLAR)


def copying(box: np.ndarray, exemplar: np.ndarray) -> float:
    """Correlation in [-1, 1] of the pixels of a painted box and the exemplar in its size; 1 = copied. A flat one: 0."""
    exemplar = resize(exemplar, box.shape[1], box.shape[0])
    a, b = (x.astype(np.float64) - x.mean((0, 1)) for x in (box, exemplar))
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
        first, second = real.numpy()[order[::2]], real.numpy()[order[1::2]]
        count = max(1, min(COMPONENTS, len(first) // 4))
        self.mixture = GaussianMixture(count, covariance_type="diag", reg_covar=1e-3, random_state=seed).fit(first)
        self.scores = np.sort(self.mixture.score_samples(second))

    def __call__(self, features: torch.Tensor) -> np.ndarray:
        """The rank of each of N x D features, N, 0..100."""
        return 100 * np.searchsorted(self.scores, self.mixture.score_samples(features.numpy())) / len(self.scores)


@dataclass(frozen=True)
class Likeness:
    """The figures of this bench: ``real`` are pictures of the train split, or backgrounds where there is none."""

    items: EvalSet
    clip: Clip
    extractor: Callable
    real: list[np.ndarray]

    @property
    def protocol(self) -> str:
        """What each figure is made of."""
        clip = f"clip_i, clip_fid and qs_own on {self.clip.name} embeddings"
        return f"{self.extractor.protocol} features, {clip}"

    @cached_property
    def real_features(self) -> torch.Tensor:
        return extract(self.real, self.extractor, self.extractor.size)

    @cached_property
    def real_embeddings(self) -> torch.Tensor:
        return embeddings(self.real, self.clip)

    @cached_property
    def quality(self) -> Quality:
        return Quality(self.real_embeddings)

    @cached_property
    def exemplars(self) -> torch.Tensor:
        return embeddings([c.exemplar for c in self.items.composites], self.clip)

    def rows(self, outputs: Sequence[np.ndarray], features: torch.Tensor) -> list[dict[str, float]]:
        """The figures of each picture, by its embedding."""
        items = self.items
        boxes = [crop_to_box(y, c.hole) for y, c in zip(outputs, items.composites, strict=True)]
        looks = [100 * cosine for cosine in cosines(embeddings(boxes, self.clip), self.exemplars)]
        ranks = self.quality(features).tolist()
        return [
            {
                "bg_drift": bg_drift(y, c.background, c.hole),
                "copying": copying(box, c.exemplar),
                "clip_i": look,
                "qs_own": rank,
            }
            for y, c, box, look, rank in zip(outputs, items.composites, boxes, looks, ranks, strict=True)
        ]

    def measure(self, raw: Sequence[np.ndarray]) -> Figures:
        """The figures of a method's outputs, raw and after paste-back."""
        items, means = self.items, {}
        for kind, outputs in (("raw", list(raw)), ("pasted", paste_outputs(items, raw))):
            features = embeddings(outputs, self.clip)
            rows = self.rows(outputs, features)
            sets = (Statistics(f.shape[1]).update(f) for f in (features, self.real_embeddings))
            numbers = aggregate(rows) | {"clip_fid": frechet_distance(*sets)}
            numbers |= distances(extract(outputs, self.extractor, self.extractor.size), self.real_features)
            means |= {f"{items.name}/{kind}/{name}": float(value) for name, value in numbers.items()}
        return Figures(means, rows)
