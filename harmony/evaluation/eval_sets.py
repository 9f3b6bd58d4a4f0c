"""Benches, on which every method sees the same pictures, holes and noise, and the figures of their outputs.

Reconstruction (Liu 2025, Tables 1 and 2): the instance's own photograph is the truth; hole and hints come from the same
photograph. Relighting (studio): the object lit by light B goes onto the empty plate lit by light A, and the render of
the object under light A, with its shadow, is the truth. Sampling starts from pure noise; figures are given for the raw
output and after paste-back.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from harmony.core.errors import UserError
from harmony.core.row import Row
from harmony.data.captions import GIVEN
from harmony.data.descriptions import Description
from harmony.data.latent_cache import Example, Recipe, example
from harmony.data.manifest import read_manifest
from harmony.methods.insert import Branch, fill
from harmony.methods.paint_by_example import fill_by_example
from harmony.metrics.fidelity import aggregate, bg_drift, image_metrics, sharpness
from harmony.metrics.frechet import Statistics, extract, frechet_distance, kid
from harmony.metrics.similarity import Clip, box_of, clip_i, clip_t, embeddings
from harmony.models.backbone import Kit
from harmony.models.clip import clip_of
from harmony.models.features import feature_extractor
from harmony.models.paint_by_example import Painter
from harmony.pixels.composites import paste_back
from harmony.pixels.exemplars import cut_out, exemplar
from harmony.pixels.images import crop_resize, grid, read_image, resize
from harmony.pixels.masks import TEST_RADIUS, bounding_box, hole, read_mask
from harmony.sampling.guidance import Settings

REPORT = 32  # pictures between two lines of progress
SHOWN_TO = Recipe(hints={"exemplar": {}})  # the test protocol, with what Paint by Example is shown
KID_BELOW = 2048  # with fewer images the covariance is singular: the kernel distance is reported too


@dataclass(frozen=True)
class Bench:
    """Examples of one split at the kit's resolution, whose pictures are the truth, and captions; ``name``: the split.

    ``backgrounds`` are the pictures that the instance is put into, ``instances`` those it is taken from, uint8
    R x R x 3; None = the truth itself. ``shadows`` bool R x R: where the truth's cast shadow lies. ``exemplars`` uint8
    S x S x 3: what Paint by Example is shown; None = the instance's own box, as the examples hold it. ``lights``: the
    words for the instance's light and for the picture's, where the dataset knows both.
    """

    name: str
    examples: list[Example]
    prompts: list[str]
    backgrounds: list[np.ndarray] | None = None
    instances: list[np.ndarray] | None = None
    shadows: list[np.ndarray] | None = None
    exemplars: list[np.ndarray] | None = None
    lights: list[Description] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def truths(self) -> list[np.ndarray]:
        return [e.image for e in self.examples]

    def seen(self) -> list[np.ndarray]:
        return self.truths() if self.backgrounds is None else self.backgrounds

    def given(self) -> list[np.ndarray]:
        return self.truths() if self.instances is None else self.instances

    def part(self, indices: Sequence[int]) -> "Bench":
        """The items at ``indices``."""
        lists = {
            field.name: getattr(self, field.name) and [getattr(self, field.name)[i] for i in indices]
            for field in fields(self)
            if field.name != "name"
        }
        return Bench(self.name, **lists)


def spread(rows: list[Row], limit: int | None) -> list[Row]:
    """Up to ``limit`` rows, evenly over the list."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, limit).round().astype(int)]


def load_bench(manifest: Path, split: str, resolution: int, limit: int | None = None) -> Bench:
    """Reconstruction by the test protocol (centre crop, dilated hole) of up to ``limit`` rows of the split."""
    rows = spread(read_manifest(manifest, split)[1], limit)
    root = Path(manifest).parent
    return Bench(split, [example(r, root, SHOWN_TO, resolution) for r in rows], [r.caption for r in rows])


def relight_bench(
    manifest: Path, split: str, resolution: int, limit: int | None = None, radius: float = TEST_RADIUS
) -> Bench:
    """Relighting of up to ``limit`` studio rows; the hole is the instance dilated by ``radius``, px at 512.

    UserError for a dataset without plates, objects under a second light, and shadows.
    """
    root = Path(manifest).parent
    rows = spread(
        [r for r in read_manifest(manifest, split)[1] if {"plate", "relit", "shadow"} <= set(r.extras)], limit
    )
    if not rows:
        raise UserError(f"{manifest} knows no truth for relighting (plate, relit, shadow): use dataset=studio")
    examples, plates, relit, shadows = [], [], [], []
    for row in rows:
        e = example(row, root, Recipe(), resolution)
        other = read_image(root / row.extras["relit"])
        own = cut_out(other, read_mask(root / row.mask, (row.width, row.height), resize=True))
        examples.append(replace(e, hole=hole(e.mask, "dilate", radius=radius), exemplar=own))
        plates.append(crop_resize(read_image(root / row.extras["plate"]), e.crop, resolution))
        relit.append(crop_resize(other, e.crop, resolution))
        shadow = read_mask(root / row.extras["shadow"], (row.width, row.height), empty=True)
        shadows.append(crop_resize(shadow, e.crop, resolution))
    captions = [row.caption for row in rows]
    lights = (
        [between(row.caption, row.extras["relit_caption"]) for row in rows] if all(map(says_lights, rows)) else None
    )
    return Bench(split, examples, captions, plates, relit, shadows, lights=lights)


def says_lights(row: Row) -> bool:
    """Whether the row's captions name the object's light in both pictures; a captioner's words need not."""
    return "relit_caption" in row.extras and row.extras.get("caption_source", GIVEN) == GIVEN


def between(caption: str, relit: str) -> Description:
    """The words of two captions of one object (``a red car on snow, grey overcast light``): ``caption`` says the light
    of the picture, ``relit`` that of the object that is put into it.
    """
    (object_, _, background), (_, _, foreground) = (text.rpartition(", ") for text in (caption, relit))
    return Description(f"{object_},", foreground, background)


def degraded(bench: Bench, factor: int) -> Bench:
    """The same bench with instances from pictures shrunk by ``factor`` and enlarged again (Liu 2025, Fig. 7)."""

    def poor(picture: np.ndarray, width: int, height: int) -> np.ndarray:
        """Shrunk to what is left of ``width`` x ``height``, and enlarged again."""
        small = resize(picture, max(1, width // factor), max(1, height // factor))
        return resize(small, picture.shape[1], picture.shape[0])

    examples = []
    for e in bench.examples:
        x0, y0, x1, y1 = bounding_box(e.mask)  # an exemplar loses what the instance loses at the bench's resolution
        examples.append(replace(e, exemplar=None if e.exemplar is None else poor(e.exemplar, x1 - x0, y1 - y0)))
    given = [poor(g, g.shape[1], g.shape[0]) for g in bench.given()]
    return replace(bench, examples=examples, instances=given)


# a method: bench -> raw outputs, uint8 R x R x 3, in its order; the indices choose the noise (default 0, 1, ...)
Fill = Callable[..., list[np.ndarray]]


def by_hints(kit: Kit, branches: Sequence[Branch], settings: Settings) -> Fill:
    """Inpainting by words and ControlNets; without any (or all of weight 0) plain inpainting by the caption."""

    def make(bench: Bench, indices: Sequence[int] | None = None) -> list[np.ndarray]:
        masks, holes = [e.mask for e in bench.examples], [e.hole for e in bench.examples]
        return fill(kit, bench.seen(), bench.given(), masks, holes, bench.prompts, branches, settings, indices)

    return make


def by_example(painter: Painter, settings: Settings) -> Fill:
    """Paint by Example, no words; what it is shown: see ``exemplars``."""

    def make(bench: Bench, indices: Sequence[int] | None = None) -> list[np.ndarray]:
        holes = [e.hole for e in bench.examples]
        return fill_by_example(painter, bench.seen(), exemplars(bench, painter.encoder.size), holes, settings, indices)

    return make


def exemplars(bench: Bench, size: int) -> list[np.ndarray]:
    """What Paint by Example is shown for each item, uint8 size x size x 3: the bench's exemplar, or the own box."""
    shown = bench.exemplars or [e.exemplar for e in bench.examples]
    return [exemplar(picture, size) for picture in shown]


def holed(bench: Bench) -> list[np.ndarray]:
    """The backgrounds, black in the hole: what of them a method sees."""
    return [np.where(e.hole[..., None], np.uint8(0), b) for e, b in zip(bench.examples, bench.seen(), strict=True)]


def sample_grid(bench: Bench, columns: dict[str, list[np.ndarray]]) -> np.ndarray:
    """Picture, uint8 H x W x 3: a row an item, with the hole, ``columns`` (title -> a picture an item), the truth."""
    rows = [list(row) for row in zip(holed(bench), *columns.values(), bench.truths(), strict=True)]
    return grid(rows, ["input", *columns, "truth"])


def scores(bench: Bench, outputs: Sequence[np.ndarray]) -> list[dict[str, float]]:
    """The figures of each output against its truth; ``bg_drift`` is against what the method was given."""
    shadows = bench.shadows or [None] * len(bench)
    results = []
    for y, e, background, shadow in zip(outputs, bench.examples, bench.seen(), shadows, strict=True):
        numbers = image_metrics(y, e.image, e.mask, e.hole, shadow)
        drift, sharp = bg_drift(y, background, e.hole), sharpness(y, e.image, e.mask)
        results.append(numbers | {"bg_drift": drift, "sharpness": sharp})
    return results


def pasted(bench: Bench, raw: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs with everything outside the holes as it was."""
    return [paste_back(y, b, e.hole) for y, b, e in zip(raw, bench.seen(), bench.examples, strict=True)]


@dataclass(frozen=True)
class Fidelity:
    """All figures of the design for outputs on ``bench``; without a ``clip`` there is no ``clip_i`` and ``clip_t``."""

    bench: Bench
    extractor: Callable
    clip: Clip | None = None

    @property
    def protocol(self) -> str:
        """What features fid, kid and the CLIP scores are made of."""
        return f"{self.extractor.protocol} features{f', clip on {self.clip.name} embeddings' if self.clip else ''}"

    @cached_property
    def real(self) -> torch.Tensor:
        """Features N x D of the truths: the other side of every fid on this bench."""
        return extract(self.bench.truths(), self.extractor, self.extractor.size)

    @cached_property
    def objects(self) -> torch.Tensor:
        return embeddings(self.boxes(self.bench.truths()), self.clip)

    @cached_property
    def words(self) -> torch.Tensor:
        return self.clip.texts(self.bench.prompts).cpu()

    def boxes(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [box_of(y, e.mask) for y, e in zip(images, self.bench.examples, strict=True)]

    def figures(self, raw: Sequence[np.ndarray]) -> dict[str, float]:
        """``<split>/raw/<metric>`` and ``<split>/pasted/<metric>``; means over images."""
        bench, results = self.bench, {}
        for kind, outputs in (("raw", list(raw)), ("pasted", pasted(bench, raw))):
            numbers = aggregate(scores(bench, outputs))
            numbers |= distances(extract(outputs, self.extractor, self.extractor.size), self.real)
            if self.clip is not None:  # times 100, as the field prints them
                numbers["clip_i"] = 100 * clip_i(embeddings(self.boxes(outputs), self.clip), self.objects)
                numbers["clip_t"] = 100 * clip_t(embeddings(outputs, self.clip), self.words)
            results |= {f"{bench.name}/{kind}/{name}": float(value) for name, value in numbers.items()}
        return results


def distances(made: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    """``fid`` of features N x D and M x D, and with few images ``kid`` too."""
    found = {"fid": frechet_distance(*(Statistics(f.shape[1]).update(f) for f in (made, real)))}
    if len(made) < KID_BELOW:
        found["kid"] = kid(made, real, subset_size=min(1000, len(made), len(real)))
    return found


def enough(bench: Bench) -> Bench:
    """``bench`` itself. UserError for fewer pictures than a distance between two sets needs."""
    if len(bench) < 2:
        raise UserError(f"{len(bench)} {bench.name} picture: fid needs two at least, raise limit= or take more data")
    return bench


def made(bench: Bench, fill: Fill, what: str) -> list[np.ndarray]:
    """The outputs of a method, with a line of progress now and then."""
    outputs, began, total = [], time.monotonic(), len(bench)
    for i in range(0, total, REPORT):
        part = list(range(i, min(i + REPORT, total)))
        outputs += fill(bench.part(part), part)
        rate = len(outputs) / (time.monotonic() - began)
        left = (total - len(outputs)) / rate
        print(f"{what}: {len(outputs)}/{total} pictures, {rate:.1f} a second, {left:.0f} s left", flush=True)
    return outputs


def before_and_after(
    kit: Kit,
    manifest: Path,
    before: Fill,
    after: Fill,
    settings: Settings,
    split: str = "test",
    limit: int | None = None,
    clip: str | None = None,
) -> tuple[dict[str, float], dict]:
    """(figures of ``after`` and, under ``baseline/``, of ``before``; ``protocol`` and ``count`` behind them).

    ``protocol`` names the features of fid and kid and the CLIP (``clip``, see ``clip_of``), ``count`` is the number of
    pictures.
    """
    bench = enough(load_bench(manifest, split, kit.resolution, limit))
    extractor = feature_extractor(kit)
    fidelity = Fidelity(bench, extractor, clip_of(kit, clip))
    name = Path(manifest).parent.name
    print(
        f"evaluating on {len(bench.examples)} {split} pictures of {name}, before and after: DDIM {settings.steps} "
        f"steps, guidance {settings.guidance}, seed {settings.seed}; fid and kid on {fidelity.protocol}",
        flush=True,
    )
    old = fidelity.figures(made(bench, before, "before"))
    new = fidelity.figures(made(bench, after, "after"))
    facts = {"protocol": fidelity.protocol, "count": len(bench.examples)}
    return {f"baseline/{name}": value for name, value in old.items()} | new, facts


SHOWN = ("color_de", "fpsnr", "psnr", "edge_f1", "fid", "kid", "seam", "bg_drift")


def table(metrics: dict[str, float], split: str, protocol: str, count: int) -> str:
    """Before and after as a Markdown table; below it the number of pictures and the features of fid and kid."""
    lines = ["| metric | before | after | change |", "|---|---|---|---|"]
    for name in [f"{split}/pasted/{m}" for m in SHOWN] + [f"{split}/raw/bg_drift"]:
        if name in metrics:
            old, new = metrics[f"baseline/{name}"], metrics[name]
            change = "" if old <= 0 or name.endswith("kid") else f"{100 * (new - old) / old:+.1f} %"  # kid is about 0
            lines.append(f"| {name} | {old:.4g} | {new:.4g} | {change} |")
    return "\n".join([*lines, "", f"n = {count}; fid and kid on {protocol}"])
