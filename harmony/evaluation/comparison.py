"""Studies: several methods on one bench, block by block, resumable, over any number of processes.

A block is ``BLOCK`` consecutive pictures of one method. It is computed as a whole and stored in one file, so that a
table is the same whether one process made it, several, or one that was killed and started again.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from harmony.core.errors import UserError
from harmony.core.row import Row
from harmony.data.descriptions import Describer
from harmony.data.manifest import manifest_hash, read_manifest
from harmony.evaluation.eval_sets import (
    Bench,
    Fidelity,
    Fill,
    by_example,
    by_hints,
    degraded,
    enough,
    exemplars,
    holed,
    load_bench,
    pasted,
    relight_bench,
    scores,
    spread,
)
from harmony.evaluation.exemplars import Likeness, exemplar_bench
from harmony.evaluation.tables import curves, heat, mosaics, pictures, write_table
from harmony.methods.insert import Branch, load_branch
from harmony.methods.zero_shot import Evaluator, Parts, best, rounds, run_together, word_scorer
from harmony.metrics.fidelity import aggregate, fmse
from harmony.models.backbone import DIFFUSION, Kit
from harmony.models.clip import clip_of
from harmony.models.controlnet import net_hash
from harmony.models.features import feature_extractor
from harmony.models.judge import evaluator, judge_hash
from harmony.models.paint_by_example import Painter, load_painter, painter_hash
from harmony.pixels.composites import copy_paste, poisson, reinhard
from harmony.pixels.exemplars import cut_out
from harmony.pixels.images import read_image
from harmony.pixels.masks import read_mask
from harmony.sampling.guidance import Settings

BLOCK = 16
REAL = 1024  # pictures of the train split that stand for real ones, at most
WAIT = 3600  # seconds without any new block after which the other processes count as dead
EXAMPLES = 8  # pictures on a study's figure
SQUARES = 3  # of them on a figure of all pairs of lambdas
PAINTER = "paint_by_example"  # which of the painters a row means that names none
WORDS_OF = ("truth", "scored")  # who describes the two lights of a composite
CHOICE = "fpsnr"  # what the best lambda is best in, on validation


@dataclass(frozen=True)
class Method:
    """A row of a table: ``name``, what makes the outputs, and the earlier rows whose outputs it is given too.

    ``judged``: hash of the evaluator that has a say in them; those of another lie elsewhere.
    """

    name: str
    fill: Fill
    earlier: tuple[str, ...] = ()
    judged: str = ""

    @property
    def stored(self) -> str:
        return " ".join(filter(None, (self.name, self.judged[:8])))


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


def block_file(folder: Path, name: str, block: range) -> Path:
    return folder / name / f"{block.start:05d}.npy"


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
    mine = [(m, block) for m, block in jobs[rank::world] if not block_file(folder, m.stored, block).exists()]
    began, done, total = time.monotonic(), 0, sum(len(block) for _, block in mine)
    for method, block in mine:
        files = [block_file(folder, name, block) for name in method.earlier]
        await_blocks(files, say)  # each process goes through the rows in order, so that none waits for ever
        made = method.fill(bench.part(block), list(block), *(list(np.load(file)) for file in files))
        store(block_file(folder, method.stored, block), made)
        done += len(block)
        rate = done / (time.monotonic() - began)
        left = (total - done) / rate
        say(f"{bench.name}: {method.name}, {done}/{total} pictures, {rate:.1f} a second, {left:.0f} s left")
    await_blocks([block_file(folder, method.stored, block) for method, block in jobs], say)


def store(path: Path, outputs: list[np.ndarray]) -> None:
    """Write a block, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        np.save(file, np.stack(outputs))
    os.replace(partial, path)


def await_blocks(files: Sequence[Path], say: Callable[[str], None] = print) -> None:
    """Return when all ``files`` are there. UserError when none has come for ``WAIT`` seconds."""
    missing, since = {path for path in files if not path.exists()}, time.monotonic()
    if missing:
        say(f"waiting for {len(missing)} blocks of the other processes")
    while missing := {path for path in missing if not path.exists()}:
        left = len(missing)
        time.sleep(0.2)
        if sum(path.exists() for path in missing):
            since = time.monotonic()
        elif time.monotonic() - since > WAIT:
            raise UserError(f"{left} blocks never came from the other processes: start the same command again")


def outputs_of(folder: Path, made_of: dict[str, str]) -> Path:
    """Where a study's outputs lie: with other weights, or other pictures, somewhere else."""
    text = json.dumps(made_of, sort_keys=True)
    return folder / "outputs" / hashlib.sha256(text.encode()).hexdigest()[:16]


def outputs(bench: Bench, method: Method, folder: Path) -> list[np.ndarray]:
    """The stored outputs of a method, uint8 R x R x 3, in the order of the bench."""
    return [image for block in blocks(len(bench)) for image in np.load(block_file(folder, method.stored, block))]


def object_of(row: Row, root: Path) -> np.ndarray:
    """The bare box of a row's object, cut out of the photograph."""
    mask = read_mask(root / row.mask, (row.width, row.height), resize=True)
    return cut_out(read_image(root / row.image), mask, pad=0)


def picked(evaluator: Evaluator) -> Fill:
    """Of the outputs of earlier rows, for each picture the one that the evaluator likes best."""

    def fill(bench: Bench, indices: Sequence[int], *rows: list[np.ndarray]) -> list[np.ndarray]:
        return [
            max(images, key=lambda y: evaluator(y, e.mask)) for *images, e in zip(*rows, bench.examples, strict=True)
        ]

    return fill


def best_picks(bench: Bench, rows: Sequence[list[np.ndarray]], picks: list[np.ndarray]) -> float:
    """The share of pictures whose pick is, inside the object, as near to the truth as the nearest of ``rows``."""
    near = []
    for pick, e, *images in zip(picks, bench.examples, *rows, strict=True):
        near.append(fmse(pick, e.image, e.mask) <= min(fmse(y, e.image, e.mask) for y in images))
    return float(np.mean(near))


def nets_of(node: dict) -> list[str]:
    """The ControlNets that a row runs."""
    named = () if {"baseline", "guidance", "zero_shot", "picked"} & {*node} else (net for net in node if net != "best")
    return [*node.get("best", ()), *(net for net in named if net != "sampling")]


class Study:
    """One study: its benches, its methods, their stored outputs, the table and the figure.

    ``spec`` is the node ``study`` of configs/evaluate.yaml, ``controlnets`` and ``painters`` (Paint by Example) what
    its rows may name, ``clip`` is open_clip's NAME/WEIGHTS (None = the kit's towers). Of ``world`` processes each makes
    its share of the outputs; the first makes the table.
    """

    def __init__(
        self,
        name: str,
        spec: dict,
        controlnets: dict[str, str | None],
        painters: dict[str, str | None],
        kit: Kit,
        manifest: Path,
        folder: Path,
        settings: Settings,
        split: str = "test",
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
        clip: str | None = None,
    ):
        self.name, self.spec, self.controlnets, self.kit, self.manifest = name, spec, controlnets, kit, manifest
        self.folder, self.settings, self.split, self.limit = folder, replace(settings, batch=BLOCK), split, limit
        self.rank, self.world, self.painters, self.openclip = rank, world, painters, clip
        self.extractor, self.clip = feature_extractor(kit), clip_of(kit, clip)
        self.branches, self.loaded, self.notes, self.part = {}, {}, [], 0

    def bench(self, split: str) -> Bench:
        at = self.manifest, split, self.kit.resolution, self.limit
        match self.spec["bench"]:
            case "reconstruct":
                return load_bench(*at)
            case "relight":
                return relight_bench(*at, radius=self.spec["radius"])
            case "exemplar":
                if self.clip is None:
                    raise UserError(f"kit {self.kit.name} has no CLIP image tower: give clip=NAME/WEIGHTS of open_clip")
                rows = read_manifest(self.manifest, split)[1]
                whole = load_bench(self.manifest, split, self.kit.resolution)
                named = [row.label for row in rows], [row.mask for row in rows]
                crops = [object_of(row, self.manifest.parent) for row in rows]
                return exemplar_bench(whole, crops, *named, self.clip, self.limit, self.notes.append)
        raise UserError(f"study.bench={self.spec['bench']}: choose reconstruct, relight or exemplar")

    def measures(self, bench: Bench) -> Fidelity | Likeness:
        """What makes the figures of the raw outputs of a method."""
        if bench.exemplars is None:
            return Fidelity(bench, self.extractor, self.clip)
        real = load_bench(self.manifest, "train", self.kit.resolution, REAL).truths()
        return Likeness(bench, self.clip, self.extractor, real)

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

    def painter(self, name: str) -> Painter:
        """The Paint by Example that ``painters`` calls ``name``, loaded once."""
        if name not in self.loaded:
            painter = load_painter(self.painters[name], self.kit)
            if painter.kit.resolution != self.kit.resolution:
                sizes = f"{painter.kit.resolution} px, the study's kit {self.kit.name} at {self.kit.resolution}"
                raise UserError(f"painters.{name} works at {sizes}: give model.path={self.painters[name]}")
            self.loaded[name] = painter
        return self.loaded[name]

    def lacking(self, node: dict) -> list[str]:
        """What a row needs and is neither shipped nor given, as options of the command."""
        if "guidance" in node:
            painter = node.get("painter", PAINTER)
            if painter not in self.painters:
                raise UserError(f"there is no painters.{painter}; there are: {', '.join(self.painters)}")
            return [] if self.painters[painter] else [f"painters.{painter}=RUN"]
        return [f"controlnets.{net}=RUN" for net in nets_of(node) if self.controlnets.get(net, "") is None]

    def by_example(self, name: str, guidance: float, painter: str = PAINTER) -> Method:
        """Paint by Example at this guidance."""
        return Method(name, by_example(self.painter(painter), replace(self.settings, guidance=float(guidance))))

    @cached_property
    def evaluator(self) -> Evaluator | None:
        return evaluator(self.spec["evaluator"], self.kit.device)

    def by_prior(self, name: str, zero_shot: dict, after: str | None = None) -> Method:
        """Zero-shot harmonization, from the outputs of the row ``after`` where one is named.

        ``zero_shot``: ``words`` (truth: those of the dataset, or scored: the describer's), ``rounds``, of which the
        evaluator chooses if there are several, and whatever else ``Parts`` knows.
        """
        node = {"words": "truth", "rounds": 1} | self.spec["zero_shot"] | zero_shot
        words, count = node.pop("words"), node.pop("rounds")
        if words not in WORDS_OF:
            raise UserError(f"study.methods.{name}: words={words}: choose {' or '.join(WORDS_OF)}")
        if unknown := {*node} - ({*Parts.__dataclass_fields__} - {"steps"}):
            raise UserError(f"study.methods.{name}: {unknown.pop()} is no part of a round")
        describe = word_scorer(self.kit, self.openclip) if words == "scored" else None
        chooses = self.evaluator if count > 1 else None
        fill = by_prior(self.kit, Parts(self.settings.steps, **node), describe, count, chooses)
        return Method(name, fill, (after,) if after else (), judge_hash(self.spec["evaluator"]) if chooses else "")

    def weighted(self, name: str, weights: dict[str, float], sampling: dict | None = None) -> Method:
        """The method that runs the ControlNets with these weights, with some settings of its own (``sampling``)."""
        branches = weighted({net: self.branch(net) for net in weights}, weights)
        if unknown := {*(sampling or {})} - {*Settings.__dataclass_fields__}:
            raise UserError(f"study.methods.{name}: sampling knows no {unknown.pop()}")
        return Method(name, by_hints(self.kit, branches, replace(self.settings, **(sampling or {}))))

    def alike(self, nets: Sequence[str], **others: float) -> dict[float, Method]:
        """Lambda -> the method that gives it to all ``nets``, and to ``others`` the weights that they have."""
        return {v: self.weighted(f"{v:g}", dict.fromkeys(nets, v) | others) for v in self.spec["lambdas"]}

    def sweep(self, low: str = "color", high: str = "structure") -> list[Method]:
        """The method of each lambda, or of each pair of them, named ``structure color``."""
        if self.spec["pairs"] == "same":
            return list(self.alike([low, high]).values())
        lambdas = self.spec["lambdas"]
        return [self.weighted(f"{h:g} {v:g}", {low: v, high: h}) for h in lambdas for v in lambdas]

    def best(self, name: str, nets: list[str], **others: float) -> Method:
        """The method of ``alike`` at the lambda that is best on the validation split; the test split has no say."""
        if not self.spec["lambdas"]:
            raise UserError(f"study.methods.{name} chooses among study.lambdas: list some")
        bench, folder = self.bench("validation"), self.made / f"choice {name}"
        if not len(bench):
            raise UserError(f"study.methods.{name} chooses on validation pictures, of which {self.manifest} has none")
        methods = self.alike(nets, **others)
        self.run(bench, list(methods.values()), folder)
        found = {}
        for weight, method in methods.items():
            scored = scores(bench, pasted(bench, outputs(bench, method, folder)))
            found[weight] = aggregate(scored)[CHOICE]
        chosen = max(found, key=found.get)
        self.notes.append(
            f"{name}: lambda {chosen:g} of {', '.join(f'{v:g}' for v in found)}, best in {CHOICE} on validation"
        )
        return replace(methods[chosen], name=name)

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
                listed.append(self.by_example(name, **node))
                self.notes.append(f"{name}: guidance {node['guidance']:g}")
            elif "zero_shot" in node:
                listed.append(self.by_prior(name, **node))
            elif "picked" in node:
                fill = picked(self.evaluator)
                listed.append(Method(name, fill, tuple(node["picked"]), judge_hash(self.spec["evaluator"])))
            elif "best" in node:
                others = {net: weight for net, weight in node.items() if net != "best"}
                listed.append(self.best(name, node["best"], **others))
            else:
                weights = {net: weight for net, weight in node.items() if net != "sampling"}
                listed.append(self.weighted(name, weights, node.get("sampling")))
        if not listed:
            raise UserError(f"{self.name} has nothing to compare: {'; '.join(self.notes)}")
        return listed

    def run(self, bench: Bench, methods: Sequence[Method], folder: Path) -> None:
        """``run`` of this module, each line saying which part of the study it belongs to."""
        self.part += 1
        run(bench, methods, folder, self.rank, self.world, lambda line: print(f"part {self.part}/{self.parts}, {line}"))

    @property
    def parts(self) -> int:
        """How many times outputs are made: a choice of lambda each, and each degree of degradation."""
        choices = [n for n in self.spec["methods"].values() if n and "best" in n and not self.lacking(n)]
        return len(choices) + len(self.spec["degrade"])

    @cached_property
    def made_of(self) -> dict[str, str]:
        """Hashes of all that decides the outputs and is not in the configuration."""
        chooses = ("image_encoder",) if self.spec["bench"] == "exemplar" and self.openclip is None else ()
        facts = {f"kit/{part}": self.kit.hash(part) for part in (*DIFFUSION, *chooses)}
        nodes = [node for node in self.spec["methods"].values() if node] or [{"best": ["color", "structure"]}]
        for node in nodes:
            if "guidance" in node:
                name = node.get("painter", PAINTER)
                path = self.painters.get(name)
                facts |= {f"painters/{name}": painter_hash(path)} if path else {}
            if "picked" in node or node.get("zero_shot", {}).get("rounds", 1) > 1:
                facts["evaluator"] = judge_hash(self.spec["evaluator"])
            for net in nets_of(node):
                path = self.controlnets.get(net)
                facts |= {f"controlnets/{net}": net_hash(path)} if path else {}
        return facts | {"manifest": manifest_hash(self.manifest)}

    @property
    def made(self) -> Path:
        """Where the outputs lie; another evaluator has its own rows there (``Method.stored``)."""
        return outputs_of(self.folder, {name: value for name, value in self.made_of.items() if name != "evaluator"})

    def measure(self) -> tuple[dict, dict, str, list[Path]]:
        """(figures, facts, table, pictures); on other ranks than the first the share of outputs alone is made."""
        whole = enough(self.bench(self.split))
        protocol = f"DDIM {self.settings.steps} steps, guidance {self.settings.guidance:g}, seed {self.settings.seed}"
        line = f"{self.name}: n = {len(whole)} {self.split} pictures of {self.manifest.parent.name}, {protocol}"
        if self.rank == 0:
            print(line, flush=True)
        methods, table, columns = self.methods(), {}, {}
        few = spread(list(range(len(whole))), EXAMPLES)
        for factor in self.spec["degrade"]:
            bench, several = whole if factor == 1 else degraded(whole, factor), len(self.spec["degrade"]) > 1
            folder = self.made / f"x{factor}"
            self.run(bench, methods, folder)
            if self.rank > 0:
                continue
            ruler, part = self.measures(bench), bench.part(few)
            what = "instance" if bench.exemplars is None else "exemplar"
            seen = part.given() if part.exemplars is None else exemplars(part, self.kit.resolution)
            columns[f"{what} x{factor}" if several else what] = seen
            for n, method in enumerate(methods, 1):
                print(f"part {self.part}/{self.parts}, measuring {method.name}, {n}/{len(methods)}", flush=True)
                row = f"{method.name} x{factor}" if several else method.name
                raw = outputs(bench, method, folder)
                table[row] = ruler.figures(raw)
                if chosen_from := (self.spec["methods"].get(method.name) or {}).get("picked"):
                    rounds = [outputs(bench, m, folder) for m in methods if m.name in chosen_from]
                    share = best_picks(bench, rounds, raw)
                    self.notes.append(
                        f"{row}: the evaluator's pick is the best of {len(rounds)} in {100 * share:.0f} %"
                    )
                columns[row] = pasted(part, [raw[i] for i in few])
        if self.rank > 0:
            return {}, {}, "", []
        for row in table:
            table[row] |= {f"paper/{metric}": value for metric, value in self.spec["paper"].get(row, {}).items()}
        facts = {"protocol": ruler.protocol, "count": len(whole), "made_of": self.made_of}
        notes = [f"{line}; fid and kid on {ruler.protocol}", *self.notes]
        if whole.backgrounds is None and whole.exemplars is None and {"copy_paste", "poisson"} & {*table}:
            notes.append("copy_paste and poisson put the truth itself back here: they bound what can be reached")
        first = "lambda" if self.spec["lambdas"] and not self.spec["methods"] else "method"
        text = write_table(self.folder, table, first, notes)
        flat = {f"{row}/{name}": value for row, numbers in table.items() for name, value in numbers.items()}
        return flat, facts, text, self.draw(whole.part(few), table, columns)

    def draw(self, part: Bench, table: dict, columns: dict[str, list]) -> list[Path]:
        """``figure.png``; curves and heat maps have the pictures beside them in ``pictures.png``.

        ``columns``: title -> a picture for each item of ``part``.
        """
        lambdas, kind = self.spec["lambdas"], self.spec["figure"]
        target, beside = self.folder / "figure.png", self.folder / "pictures.png"
        labels = ("lambda_l (colour)", "lambda_h (structure)")
        metrics = [f"{part.name}/{metric}" for metric in self.spec["drawn"]]
        if kind == "heat":
            names = [[f"{h:g} {v:g}" for v in lambdas] for h in lambdas]
            values = {m: np.array([[table[name][m] for name in row] for row in names]) for m in metrics}
            heat(target, values, lambdas, lambdas, labels)
            squares = [[[columns[name][i] for name in row] for row in names] for i in range(min(SQUARES, len(part)))]
            mosaics(beside, squares, lambdas, lambdas, labels)
            return [target, beside]
        shown = {title: column for title, column in columns.items() if title not in self.spec["hidden"]}
        rows = list(zip(holed(part), *shown.values(), part.truths(), strict=True))
        titles = ["input", *shown, "truth" if part.exemplars is None else "source"]
        guided = {
            row: n["guidance"] for row, n in self.spec["methods"].items() if n and "guidance" in n and row in table
        }
        points = guided or {f"{v:g}": v for v in lambdas if f"{v:g}" in table}
        if kind != "curves" or not points:
            pictures(target, rows, titles)
            return [target]
        pictures(beside, rows, titles)
        curves(target, table, points, metrics, "guidance" if guided else "lambda")
        return [target, beside]


def by_prior(
    kit: Kit,
    parts: Parts,
    describe: Describer | None = None,
    count: int = 1,
    evaluator: Evaluator | None = None,
) -> Fill:
    """Zero-shot harmonization for a bench; ``describe`` None = the words that the bench knows.

    Further outputs are those of an earlier row: the instances are then taken from these.
    """

    def make(
        bench: Bench, indices: Sequence[int] | None = None, earlier: list[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        masks = [e.mask for e in bench.examples]
        instances = bench.given() if earlier is None else earlier
        composites = [copy_paste(*item) for item in zip(bench.seen(), instances, masks, strict=True)]
        if describe is None:
            if bench.lights is None:
                raise UserError("this bench does not know the words for both lights: choose words: scored")
            words = [[light] for light in bench.lights]
        else:
            first = [copy_paste(*item) for item in zip(bench.seen(), bench.given(), masks, strict=True)]
            words = [describe(*item) for item in zip(first, masks, strict=True)]
        asked = [rounds(*item, len(w), count, evaluator) for *item, w in zip(composites, masks, words, strict=True)]
        return [best(made).image for made in run_together(kit, asked, words, masks, parts)]

    return make
