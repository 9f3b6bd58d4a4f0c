"""F3. Studies: several methods on one bench, block by block, resumable, over any number of processes.

A block is ``BLOCK`` consecutive pictures of one method. It is computed as a whole and stored in one file, so that a
table is the same whether one process made it, several, or one that was killed and started again.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from harmony.composites import copy_paste, poisson, reinhard
from harmony.data.manifest import read_manifest
from harmony.errors import UserError
from harmony.exemplars import exemplar
from harmony.images import read_image
from harmony.masks import read_mask
from harmony.metrics.similarity import KitClip, OpenClip
from harmony.models.exemplar import Painter, load_painter
from harmony.models.kit import Kit
from harmony.sample import Row
from harmony.sampling.benchmark import (
    Bench,
    Fill,
    by_example,
    by_hints,
    degraded,
    feature_extractor,
    figures,
    holed,
    kit_clip,
    load_bench,
    pasted,
    relight_bench,
    spread,
    truth_features,
)
from harmony.sampling.exemplar_bench import Likeness, exemplar_bench
from harmony.sampling.harmonize import Branch, Settings, load_branch
from harmony.sampling.tables import curves, heat, pictures, write_table

BLOCK = 16
REAL = 1024  # pictures of the train split that stand for real ones, at most
WAIT = 3600  # seconds without any new block after which the other processes count as dead
EXAMPLES = 8  # pictures on a study's figure
CURVES = ("raw/fid", "pasted/fpsnr", "pasted/color_de", "pasted/edge_f1")
CHOICE = "pasted/fpsnr"  # what the best lambda is best in, on validation


@dataclass(frozen=True)
class Method:
    """A row of a table: ``name``, and what makes the outputs."""

    name: str
    fill: Fill


def _reinhard(background: np.ndarray, instance: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return copy_paste(background, reinhard(instance, mask, background), mask)


BASELINES = {"copy_paste": copy_paste, "reinhard": _reinhard, "poisson": poisson}  # (background, instance, mask)


def baseline(kind: str, name: str | None = None) -> Method:
    """A composite without a network, named as its kind unless ``name`` is given. UserError for an unknown kind."""
    if kind not in BASELINES:
        raise UserError(f"baseline={kind}: choose one of {', '.join(BASELINES)}")
    make = BASELINES[kind]

    def fill(bench: Bench, indices: Sequence[int]) -> list[np.ndarray]:
        masks = [e.mask for e in bench.examples]
        return [make(*item) for item in zip(bench.seen(), bench.given(), masks, strict=True)]

    return Method(name or kind, fill)


def weighted(branches: Mapping[str, Branch], weights: Mapping[str, float]) -> list[Branch]:
    """The named branches, each with its weight."""
    return [replace(branches[name], weight=float(weight)) for name, weight in weights.items()]


def blocks(count: int) -> list[range]:
    return [range(i, min(i + BLOCK, count)) for i in range(0, count, BLOCK)]


def block_file(folder: Path, method: Method, block: range) -> Path:
    return folder / method.name / f"{block.start:05d}.npy"


def run(
    bench: Bench,
    methods: Sequence[Method],
    folder: Path,
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = print,
) -> None:
    """Compute this process's share of the blocks that are not in ``folder`` yet, then wait for those of the others."""
    jobs = [(method, block) for method in methods for block in blocks(len(bench))]
    mine = [job for job in jobs[rank::world] if not block_file(folder, *job).exists()]
    began, done, total = time.monotonic(), 0, sum(len(block) for _, block in mine)
    for method, block in mine:
        store(block_file(folder, method, block), method.fill(bench.part(block), list(block)))
        done += len(block)
        rate = done / (time.monotonic() - began)
        left = (total - done) / rate
        say(f"{bench.name}: {method.name}, {done}/{total} pictures, {rate:.1f} a second, {left:.0f} s left")
    await_blocks([block_file(folder, *job) for job in jobs])


def store(path: Path, outputs: list[np.ndarray]) -> None:
    """Write a block, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        np.save(file, np.stack(outputs))
    os.replace(partial, path)


def await_blocks(files: Sequence[Path]) -> None:
    """Return when all ``files`` are there. UserError when none has come for ``WAIT`` seconds."""
    missing, since = set(files), time.monotonic()
    while missing := {path for path in missing if not path.exists()}:
        left = len(missing)
        time.sleep(0.2)
        if sum(path.exists() for path in missing):
            since = time.monotonic()
        elif time.monotonic() - since > WAIT:
            raise UserError(f"{left} blocks never came from the other processes: start the same command again")


def outputs(bench: Bench, method: Method, folder: Path) -> list[np.ndarray]:
    """The stored outputs of a method, uint8 R x R x 3, in the order of the bench."""
    return [image for block in blocks(len(bench)) for image in np.load(block_file(folder, method, block))]


def object_of(row: Row, root: Path) -> np.ndarray:
    """The bare box of a row's object, cut out of the photograph."""
    mask = read_mask(root / row.mask, (row.width, row.height), resize=True)
    return exemplar(read_image(root / row.image), mask, pad=0)


class Study:
    """One study: its benches, its methods, their stored outputs, the table and the figure.

    ``spec`` is the node ``study`` of configs/evaluate.yaml, ``controlnets`` what its rows may name, ``painter`` its
    Paint by Example, ``clip`` open_clip's NAME/WEIGHTS (None = the kit's towers). Of ``world`` processes each makes its
    share of the outputs; the first makes the table.
    """

    def __init__(
        self,
        name: str,
        spec: dict,
        controlnets: dict[str, str],
        kit: Kit,
        manifest: Path,
        folder: Path,
        settings: Settings,
        split: str = "test",
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
        painter: str | None = None,
        clip: str | None = None,
    ):
        self.name, self.spec, self.controlnets, self.kit, self.manifest = name, spec, controlnets, kit, manifest
        self.folder, self.settings, self.split, self.limit = folder, replace(settings, batch=BLOCK), split, limit
        self.rank, self.world, self.painter, self.openclip = rank, world, painter, clip
        self.extractor = feature_extractor(kit)
        self.branches, self.notes = {}, []

    def bench(self, split: str) -> Bench:
        at = self.manifest, split, self.kit.resolution, self.limit
        match self.spec["bench"]:
            case "reconstruct":
                return load_bench(*at)
            case "relight":
                return relight_bench(*at, radius=self.spec["radius"])
            case "exemplar":
                rows = read_manifest(self.manifest, split)[1]
                whole = load_bench(self.manifest, split, self.kit.resolution)
                named = [row.label for row in rows], [row.mask for row in rows]
                crops = [object_of(row, self.manifest.parent) for row in rows]
                return exemplar_bench(whole, crops, *named, self.clip, self.limit, self.notes.append)
        raise UserError(f"study.bench={self.spec['bench']}: choose reconstruct, relight or exemplar")

    def measures(self, bench: Bench) -> Callable[[Sequence[np.ndarray]], dict[str, float]]:
        """What makes the figures of the raw outputs of a method."""
        if bench.exemplars is None:
            truth = truth_features(bench, self.extractor)
            return lambda raw: figures(bench, raw, self.extractor, truth)
        real = load_bench(self.manifest, "train", self.kit.resolution, REAL).truths()
        self.notes.append(f"clip_i, clip_fid and qs_own on embeddings of {self.clip.name}")
        return Likeness(bench, self.clip, self.extractor, real).figures

    @cached_property
    def clip(self) -> KitClip | OpenClip:
        if self.openclip is None:
            return kit_clip(self.kit)
        return OpenClip(*self.openclip.split("/", 1), device=self.kit.device)

    def branch(self, name: str) -> Branch:
        """The ControlNet that ``controlnets`` calls ``name``, loaded once."""
        if name not in self.controlnets:
            raise UserError(f"there is no controlnets.{name}; there are: {', '.join(self.controlnets)}")
        if self.controlnets[name] is None:
            raise UserError(f"this study needs controlnets.{name}=RUN, a trained ControlNet that is not shipped")
        if name not in self.branches:
            every = dict.fromkeys(("color", "structure", "raw"), 1.0)
            self.branches[name] = load_branch(self.controlnets[name], self.kit, every)
        return self.branches[name]

    @cached_property
    def loaded_painter(self) -> Painter:
        painter = load_painter(self.painter, self.kit)
        if painter.kit.resolution != self.kit.resolution:
            sizes = f"{painter.kit.resolution} px, the study's kit {self.kit.name} at {self.kit.resolution}"
            raise UserError(f"painter={self.painter} works at {sizes}: give model.path={self.painter}")
        return painter

    def lacking(self, node: dict) -> list[str]:
        """What a row needs and is neither shipped nor given, as options of the command."""
        if "guidance" in node:
            return [] if self.painter else ["painter=RUN"]
        nets = [] if "baseline" in node else node.get("best", node)
        return [f"controlnets.{net}=RUN" for net in nets if self.controlnets.get(net, "") is None]

    def by_example(self, name: str, guidance: float) -> Method:
        """Paint by Example, loaded once, at this guidance."""
        settings = replace(self.settings, guidance=float(guidance))
        return Method(name, by_example(self.loaded_painter, settings))

    def weighted(self, name: str, weights: dict[str, float]) -> Method:
        """The method that runs the ControlNets with these weights."""
        branches = weighted({net: self.branch(net) for net in weights}, weights)
        return Method(name, by_hints(self.kit, branches, self.settings))

    def sweep(self, names: Sequence[str] = ("color", "structure")) -> list[Method]:
        """Method for each lambda, or for each pair of them as ``structure color``."""
        lambdas = self.spec["lambdas"]
        if self.spec["pairs"] == "same":
            return [self.weighted(f"{v:g}", dict.fromkeys(names, v)) for v in lambdas]
        low, high = names
        return [self.weighted(f"{h:g} {v:g}", {low: v, high: h}) for h in lambdas for v in lambdas]

    def best(self, name: str, nets: list[str]) -> Method:
        """The method at the lambda that is best on the validation split; the test split has no say."""
        bench, folder = self.bench("validation"), self.folder / "outputs" / f"choice {name}"
        methods = self.sweep(nets)
        run(bench, methods, folder, self.rank, self.world)
        measure = self.measures(bench)
        found = {m.name: measure(outputs(bench, m, folder)) for m in methods}
        chosen = max(found, key=lambda lam: found[lam][f"validation/{CHOICE}"])
        self.notes.append(f"{name}: lambda {chosen} of {', '.join(found)}, best on validation in {CHOICE}")
        return self.weighted(name, dict.fromkeys(nets, float(chosen)))

    def methods(self) -> list[Method]:
        listed = [] if self.spec["methods"] else self.sweep()
        for name, node in self.spec["methods"].items():
            if node is None:
                self.notes.append(f"{name}: not measured yet")
            elif lacking := self.lacking(node):
                self.notes.append(f"{name}: left out, give {' and '.join(lacking)}")
            elif "baseline" in node:
                listed.append(baseline(node["baseline"], name))
            elif "guidance" in node:
                listed.append(self.by_example(name, node["guidance"]))
                self.notes.append(f"{name}: guidance {node['guidance']:g}")
            elif "best" in node:
                listed.append(self.best(name, node["best"]))
            else:
                listed.append(self.weighted(name, node))
        return listed

    def measure(self) -> tuple[dict, dict, str, Path]:
        """(figures, facts, table, picture); on other ranks than the first the share of outputs alone is made."""
        whole = self.bench(self.split)
        protocol = f"DDIM {self.settings.steps} steps, guidance {self.settings.guidance:g}, seed {self.settings.seed}"
        line = f"{self.name}: n = {len(whole)} {self.split} pictures of {self.manifest.parent.name}, {protocol}"
        if self.rank == 0:
            print(line, flush=True)
        methods, table, shown = self.methods(), {}, {}
        for factor in self.spec["degrade"]:
            bench = whole if factor == 1 else degraded(whole, factor)
            folder, measure = self.folder / "outputs" / f"x{factor}", None
            run(bench, methods, folder, self.rank, self.world)
            if self.rank > 0:
                continue
            for method in methods:
                row = method.name if len(self.spec["degrade"]) == 1 else f"{method.name} x{factor}"
                shown[row] = outputs(bench, method, folder)
                measure = measure or self.measures(bench)
                table[row] = measure(shown[row])
        if self.rank > 0:
            return {}, {}, "", self.folder
        for row, printed in self.spec["paper"].items():
            table.setdefault(row, {}).update({f"paper/{metric}": value for metric, value in printed.items()})
        facts = {"protocol": self.extractor.protocol, "count": len(whole)}
        notes = [f"{line}; fid and kid on {self.extractor.protocol} features", *self.notes]
        first = "lambda" if self.spec["lambdas"] and not self.spec["methods"] else "method"
        text = write_table(self.folder, table, first, notes)
        picture = self.figure(whole, table, shown)
        flat = {f"{row}/{name}": value for row, numbers in table.items() for name, value in numbers.items()}
        return flat, facts, text, picture

    def figure(self, bench: Bench, table: dict, shown: dict) -> Path:
        """``figure.png``; curves and heat maps have the pictures beside them in ``pictures.png``."""
        few = spread(list(range(len(bench))), EXAMPLES)
        part, lambdas = bench.part(few), self.spec["lambdas"]
        columns = {row: pasted(part, [images[i] for i in few]) for row, images in shown.items()}
        target = self.folder / "figure.png"
        beside = target if self.spec["figure"] == "pictures" else self.folder / "pictures.png"
        if self.spec["figure"] == "heat":
            squares = [[columns[f"{h:g} {v:g}"][0] for v in lambdas] for h in reversed(lambdas)]
            pictures(beside, squares, [f"colour {v:g}" for v in lambdas])
            metrics = [f"{bench.name}/{metric}" for metric in CURVES]
            values = {m: np.array([[table[f"{h:g} {v:g}"][m] for v in lambdas] for h in lambdas]) for m in metrics}
            heat(target, values, lambdas, lambdas, ("lambda_l (colour)", "lambda_h (structure)"))
        else:
            seen, what = (part.given(), "instance") if part.exemplars is None else (part.exemplars, "exemplar")
            rows = list(zip(holed(part), seen, *columns.values(), part.truths(), strict=True))
            pictures(beside, rows, ["input", what, *columns, "truth" if part.exemplars is None else "source"])
        if self.spec["figure"] == "curves":
            curves(target, table, [f"{bench.name}/{metric}" for metric in CURVES], "lambda")
        return target
