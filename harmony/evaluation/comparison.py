"""Comparisons: several methods on one eval set, resumable, over any number of processes, to a table and a figure.

A row is a method by its options (``Row``), or a choice: of the best value of some options on validation, or, for each
picture, of the output of other rows that an evaluator likes best.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np

from harmony.core.errors import UserError
from harmony.core.files import write_json
from harmony.core.progress import tell
from harmony.data.manifest import manifest_hash, read_manifest
from harmony.evaluation.blocks import fill_blocks, outputs_of
from harmony.evaluation.eval_sets import (
    EXEMPLAR,
    RECONSTRUCT,
    RELIGHT,
    EvalSet,
    degrade,
    enough,
    load_reconstruct,
    load_truths,
    paste_outputs,
    subsample,
    with_holes,
)
from harmony.evaluation.exemplars import Likeness, load_exemplars, load_own_exemplars
from harmony.evaluation.figures import Fidelity, list_samples, scores
from harmony.evaluation.pages import ROWS, by_row
from harmony.evaluation.report import Report
from harmony.evaluation.study import Study, StudyRun
from harmony.evaluation.tables import ERROR, curves, flat, heat, mosaics, pictures, write_table
from harmony.methods.insert import FULL, NONE, Detailed
from harmony.methods.method import LIGHTS, Composite, Method, Seed, fingerprint
from harmony.metrics.fidelity import aggregate, fmse, standard_errors
from harmony.models.features import feature_extractor
from harmony.models.judge import Evaluator, load_evaluator
from harmony.pixels.exemplars import exemplar
from harmony.pixels.images import write_image

FEWEST = 4  # pictures of the train split that a mixture can be fitted on
REAL = 1024  # pictures of the train split that stand for real ones, at most
EXAMPLES = 8  # pictures on a study's figure
SQUARES = 3  # of them on a figure of all pairs of weights
CHOICE = "fpsnr"  # what the best value of an option is best in, on validation
SWEPT = ("lambda_l", "lambda_h")  # the weights that a sweep goes through: of color, of structure


@dataclass(frozen=True)
class Row:
    """A row of a table: the ``options`` of a method (None: not measured yet), those of them whose ``best`` value
    validation chooses, or the rows of which an output is ``picked`` for each picture. ``lacking``: what has to be given
    before it can be measured.
    """

    options: dict | None = None
    best: tuple[str, ...] = ()
    picked: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()


class Picked(Method):
    """Of the outputs of other rows, for each picture the one that the evaluator likes best.

    ``read``: the outputs of a row on the eval set that is being filled.
    """

    read: Callable[[Method], list[np.ndarray]]

    def __init__(self, rows: Sequence[Method], evaluator: Evaluator):
        self.rows, self.evaluator = list(rows), evaluator
        self.resolution = self.rows[0].resolution

    @property
    def fingerprint(self) -> str:
        return fingerprint("picked", [row.fingerprint for row in self.rows], self.evaluator.fingerprint)

    def fill(self, composites: Sequence[Composite], seeds: Sequence[Seed]) -> list[np.ndarray]:
        outputs = [self.read(row) for row in self.rows]
        return [
            max((row[index] for row in outputs), key=lambda y, c=c: self.evaluator(y, c.mask))
            for c, (_, index) in zip(composites, seeds, strict=True)
        ]


def best_picks(items: EvalSet, rows: Sequence[list[np.ndarray]], picks: list[np.ndarray]) -> float:
    """The share of pictures whose pick is, inside the object, as near to the truth as the nearest of ``rows``."""
    near = []
    for pick, c, truth, *images in zip(picks, items.composites, items.truths, *rows, strict=True):
        near.append(fmse(pick, truth, c.mask) <= min(fmse(y, truth, c.mask) for y in images))
    return float(np.mean(near))


@dataclass
class Comparison(Study):
    """A study of several methods on one eval set: their stored outputs, the table and the figure.

    The options are those of ``configs/study/comparison.yaml``. ``rows`` and ``sweep`` are keywords of ``Row``; the
    weights (``SWEPT``) of ``sweep`` go through ``lambdas``.
    """

    run: StudyRun
    eval_set: str
    rows: dict[str, dict]
    against: str | None
    radius: float
    degrade: Sequence[int]
    sweep: dict | None
    lambdas: Sequence[float]
    pairs: str
    figure: str
    hidden: Sequence[str]
    drawn: Sequence[str]
    paper: dict[str, dict[str, float]]
    notes: list[str] = field(default_factory=list, init=False)
    part: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.rows = {name: Row(**facts) for name, facts in self.rows.items()}
        self.sweep = self.sweep and Row(**self.sweep)

    @cached_property
    def extractor(self) -> Callable:
        return feature_extractor(self.run.backbone)

    @cached_property
    def evaluator(self) -> Evaluator | None:
        return load_evaluator(self.run.evaluator, self.run.backbone.device)

    def load(self, split: str) -> EvalSet:
        """The eval set on a split of the dataset."""
        run = self.run
        at = run.manifest, split, run.backbone.resolution
        match self.eval_set:
            case "reconstruct" | "relight":
                return load_truths(self.eval_set, *at, run.limit, self.radius)
            case "exemplar":
                if run.embedder is None:
                    raise UserError(
                        f"backbone {run.backbone.name} has no CLIP image tower: give clip=NAME/WEIGHTS of open_clip"
                    )
                if own := load_own_exemplars(*at, run.limit):
                    return own
                rows = read_manifest(run.manifest, split)[1]
                return load_exemplars(
                    load_reconstruct(*at), rows, run.manifest.parent, run.embedder, run.limit, self.notes.append
                )
        raise UserError(f"study.eval_set={self.eval_set}: choose {RECONSTRUCT}, {RELIGHT} or {EXEMPLAR}")

    def measures(self, items: EvalSet) -> Fidelity | Likeness:
        """What makes the figures of the raw outputs of a method."""
        if items.kind != EXEMPLAR:
            metrics, lines = self.run.metrics
            self.notes += [line for line in lines if line not in self.notes]
            return Fidelity(items, self.extractor, self.run.embedder, metrics)
        self.notes += [f"{name}: not measured on exemplars" for name, value in self.run.weights.items() if value]
        real = load_reconstruct(self.run.manifest, "train", self.run.backbone.resolution, REAL).truths
        if not real:
            self.notes.append("no train split: clip_fid, fid, kid and qs_own compare with the bench's own backgrounds")
            real = items.backgrounds
        if len(real) < FEWEST:
            raise UserError(
                f"{len(real)} real pictures: qs_own needs {FEWEST} at least, take more data or raise limit="
            )
        return Likeness(items, self.run.embedder, self.extractor, real)

    # --- rows

    def build(self, options: dict) -> Method:
        """The method of a row; with ``detail: full`` the composite keeps its own detail."""
        options = dict(options)
        detail = options.pop("detail", NONE)
        method = self.run.build(options)
        return Detailed(method) if detail == FULL else method

    def sweep_methods(self) -> dict[str, Method]:
        """The method of ``sweep`` at each weight, or at each pair of them, named ``structure color``."""
        if self.sweep is None:
            return {}
        if self.sweep.lacking:
            raise UserError(f"{self.run.name} needs {' and '.join(self.sweep.lacking)}, trained and not shipped")
        options, lambdas = self.sweep.options, self.lambdas
        if self.pairs == "same":
            return {f"{v:g}": self.build(options | dict.fromkeys(SWEPT, v)) for v in lambdas}
        low, high = SWEPT
        return {f"{h:g} {v:g}": self.build(options | {low: v, high: h}) for h in lambdas for v in lambdas}

    @cached_property
    def has_validation(self) -> bool:
        """Whether the dataset has pictures on which rows can choose."""
        return bool(read_manifest(self.run.manifest, "validation")[1])

    def best(self, name: str, row: Row) -> Method:
        """The method at the value of its ``best`` options that is best on validation; the test split has no say."""
        if not self.lambdas:
            raise UserError(f"study.rows.{name} chooses among study.lambdas: list some")
        items = self.load("validation")
        methods = {v: self.build(row.options | dict.fromkeys(row.best, v)) for v in self.lambdas}
        self.fill(items, {f"{v:g}": method for v, method in methods.items()})
        results = {}
        for value, method in methods.items():
            outputs = paste_outputs(items, self.outputs(items, method))
            results[value] = aggregate(scores(items, outputs))[CHOICE]
        value = max(results, key=results.get)
        self.notes.append(
            f"{name}: lambda {value:g} of {', '.join(f'{v:g}' for v in results)}, best in {CHOICE} on validation"
        )
        return methods[value]

    def methods(self) -> dict[str, Method]:
        """Row -> method, in the order of the table."""
        methods, omissions = self.sweep_methods(), set()
        for name, row in self.rows.items():
            if (reason := self.omission(row, omissions)) is not None:
                omissions.add(name)
                self.notes.append(f"{name}: {reason}")
            elif row.picked:
                methods[name] = self.picked(name, row, methods)
            elif row.best:
                methods[name] = self.best(name, row)
            else:
                methods[name] = self.build(row.options)
                if (guidance := row.options.get("guidance")) is not None:
                    self.notes.append(f"{name}: guidance {guidance:g}")
        if not methods:
            raise UserError(f"{self.run.name} has nothing to compare: {'; '.join(self.notes)}")
        return methods

    def keep_fitting(self, methods: dict[str, Method], items: EvalSet) -> dict[str, Method]:
        """The methods that can take the items: those that need words for both lights are left out without them.

        UserError if none is left, or not the row that others are compared with.
        """
        if not all(c.lights for c in items.composites):
            wordless = [name for name, method in methods.items() if LIGHTS in method.wants]
            self.notes += [f"{name}: left out, the dataset has no words for both lights" for name in wordless]
            for name, row in self.rows.items():
                if missing := [other for other in row.picked if other in wordless]:
                    wordless.append(name)
                    self.notes.append(f"{name}: left out, it picks from {' and '.join(missing)}")
            methods = {name: method for name, method in methods.items() if name not in wordless}
        if not methods:
            raise UserError(f"{self.run.name} has nothing to compare: {'; '.join(self.notes)}")
        if self.against not in (None, *methods):
            raise UserError(f"study.against={self.against}: no such row; choose among {', '.join(methods)}")
        return methods

    def omission(self, row: Row, omissions: set[str]) -> str | None:
        """The reason for which a row is left out, as those called ``omissions`` are; None for a row of the table."""
        if row.picked:
            missing = [name for name in row.picked if name in omissions]
            return f"left out, it picks from {' and '.join(missing)}" if missing else None
        if row.options is None:
            return "not measured yet"
        if row.lacking:
            return f"left out, give {' and '.join(row.lacking)}"
        if row.best and not self.has_validation:
            return "left out, it chooses on validation pictures, of which the dataset has none"
        return None

    def picked(self, name: str, row: Row, methods: dict[str, Method]) -> Method:
        if unknown := [other for other in row.picked if other not in methods]:
            raise UserError(f"study.rows.{name} picks among rows above it: {unknown[0]} is none")
        return Picked([methods[other] for other in row.picked], self.evaluator)

    # --- outputs

    def fill(self, items: EvalSet, methods: dict[str, Method]) -> None:
        """``fill_blocks``, each line saying which part of the study it belongs to."""
        self.part += 1
        run, say = self.run, partial(self.say, self.part)
        for of_picked in (False, True):  # what is picked from other rows comes when these are there
            rows = {name: m for name, m in methods.items() if isinstance(m, Picked) == of_picked}
            for row in rows.values() if of_picked else ():
                row.read = cache(partial(self.outputs, items))  # of a degraded set, its own; each row's once
            fill_blocks(items, rows, run.folder, run.seed, run.rank, run.world, say)

    def outputs(self, items: EvalSet, method: Method) -> list[np.ndarray]:
        return outputs_of(items, method, self.run.folder, self.run.seed)

    @property
    def parts(self) -> int:
        """How many times outputs are made: a choice on validation each, and each degree of degradation."""
        choices = [row for row in self.rows.values() if row.best and not row.lacking and self.has_validation]
        return len(choices) + len(self.degrade)

    def say(self, part: int, line: str) -> None:
        tell(f"part {part}/{self.parts}, {line}")

    # --- the report

    def measure(self) -> Report:
        """The report; on other ranks than the first the share of outputs alone is made."""
        run = self.run
        full = enough(self.load(run.split))
        line = f"{run.name}: n = {len(full)} {run.split} pictures of {run.manifest.parent.name}, {run.protocol}"
        if run.rank == 0:
            tell(line)
        methods, table, samples = self.keep_fitting(self.methods(), full), {}, {}
        few = subsample(list(range(len(full))), ROWS)
        part = full.part(few)
        columns = {"input": with_holes(part)}
        several = len(self.degrade) > 1
        for factor in self.degrade:
            items = degrade(full, factor)
            self.fill(items, methods)
            if run.rank == 0:
                suffix = f" x{factor}" if several else ""
                ruler = self.measures(items)
                figures, rows_of = self.figures(items, methods, ruler, suffix)
                table |= figures
                of_items = list_samples(items.names, items.captions, rows_of)
                samples = {key: samples.get(key, {}) | row for key, row in of_items.items()}
                columns |= self.columns(items, methods, few, suffix)
        if run.rank > 0:
            return Report()
        columns["source" if full.kind == EXEMPLAR else "truth"] = part.truths
        for row in table:
            table[row] |= {f"paper/{metric}": value for metric, value in self.paper.get(row, {}).items()}
        notes = [f"{line}; fid and kid on {ruler.protocol}", *self.notes]
        if full.kind == RECONSTRUCT and {"copy_paste", "poisson"} & {*table}:
            notes.append("copy_paste and poisson put the truth itself back here: they bound what can be reached")
        text = write_table(run.folder, table, "lambda" if self.sweep else "method", notes)
        prints = {name: method.fingerprint for name, method in methods.items()}
        facts = {"protocol": ruler.protocol, "count": len(full), "methods": prints}
        facts |= {"manifest": manifest_hash(run.manifest)}
        files = self.draw(full.name, table, {title: subsample(column, EXAMPLES) for title, column in columns.items()})
        rows = by_row(part.names, part.captions, columns)
        return Report(flat(table), facts, text, files, rows, samples)

    def write_inputs(self, folder: Path) -> None:
        if self.eval_set == EXEMPLAR:
            super().write_inputs(folder)
        items = self.load(self.run.split)
        parts = {"backgrounds": with_holes(items)}
        parts |= {f"{name}s": [getattr(c, name) for c in items.composites] for name in ("mask", "hole")}
        if items.kind != RECONSTRUCT:  # there the composite is the truth
            parts["composites"] = [c.copy_paste() for c in items.composites]
        names = [c.name for c in items.composites]
        for part, pictures_of in parts.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            for name, picture in zip(names, pictures_of, strict=True):
                write_image(folder / part / f"{name}.png", picture)
        write_json(folder / "captions.json", {c.name: c.caption for c in items.composites})

    def figures(
        self, items: EvalSet, methods: dict[str, Method], ruler: Fidelity | Likeness, suffix: str
    ) -> tuple[dict[str, dict], dict[str, list[dict]]]:
        """Row -> figures, and row -> those of each picture; notes say how often a pick was the best there was."""
        table, pictures_of = {}, {}
        against = self.against or next(iter(methods))
        for n, (name, method) in enumerate(methods.items(), 1):
            self.say(self.part, f"measuring {name}, {n}/{len(methods)}")
            raw = self.outputs(items, method)
            figures = ruler.measure(raw)
            table[f"{name}{suffix}"], pictures_of[name] = figures.means, figures.rows
            if isinstance(method, Picked):
                share = 100 * best_picks(items, [self.outputs(items, row) for row in method.rows], raw)
                self.notes.append(
                    f"{name}{suffix}: the evaluator's pick is the best of {len(method.rows)} in {share:.0f} %"
                )
        for name, rows in pictures_of.items():
            errors = standard_errors(rows, pictures_of[against])
            table[f"{name}{suffix}"] |= {f"{items.name}/pasted/{m}{ERROR}": v for m, v in errors.items()}
        if len(methods) > 1:
            self.notes.append(f"±: paired standard error of the difference from {against}{suffix}")
        return table, {f"{name}{suffix}": rows for name, rows in pictures_of.items()}

    def columns(self, items: EvalSet, methods: dict[str, Method], few: Sequence[int], suffix: str) -> dict[str, list]:
        """Title -> pictures of the items ``few``: the instance or exemplar, and each row after paste-back."""
        part, columns, side = items.part(few), {}, self.run.backbone.resolution
        if items.kind == EXEMPLAR:
            columns[f"exemplar{suffix}"] = [exemplar(c.exemplar, side) for c in part.composites]
        else:
            columns[f"instance{suffix}"] = part.instances
        for name, method in methods.items():
            raw = self.outputs(items, method)
            columns[f"{name}{suffix}"] = paste_outputs(part, [raw[i] for i in few])
        return columns

    def draw(self, split: str, table: dict, columns: dict[str, list]) -> list[Path]:
        """``figure.png``; curves and heat maps have the pictures beside them in ``pictures.png``.

        ``columns``: title -> pictures, the input first and the truth last.
        """
        lambdas, kind, folder = self.lambdas, self.figure, self.run.folder
        target, beside = folder / "figure.png", folder / "pictures.png"
        labels = ("lambda_l (color)", "lambda_h (structure)")
        metrics = [f"{split}/{metric}" for metric in self.drawn]
        if kind == "heat":
            names = [[f"{h:g} {v:g}" for v in lambdas] for h in lambdas]
            values = {m: np.array([[table[name][m] for name in row] for row in names]) for m in metrics}
            heat(target, values, lambdas, lambdas, labels)
            count = min(SQUARES, len(columns["input"]))
            squares = [[[columns[name][i] for name in row] for row in names] for i in range(count)]
            mosaics(beside, squares, lambdas, lambdas, labels)
            return [target, beside]
        shown_pictures = {title: column for title, column in columns.items() if title not in self.hidden}
        rows, titles = list(zip(*shown_pictures.values(), strict=True)), list(shown_pictures)
        guidances = {
            name: row.options["guidance"]
            for name, row in self.rows.items()
            if name in table and (row.options or {}).get("guidance") is not None
        }
        points = guidances or {f"{v:g}": v for v in lambdas if f"{v:g}" in table}
        if kind != "curves" or not points:
            pictures(target, rows, titles)
            return [target]
        pictures(beside, rows, titles)
        curves(target, table, points, metrics, "guidance" if guidances else "lambda")
        return [target, beside]
