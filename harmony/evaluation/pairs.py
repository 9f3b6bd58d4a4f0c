"""Pairs: photographs whose object was put under another light, against the photographs as they were taken.

The protocol of iHarmony4 (Cong 2020) on any dataset: the composite is the dataset's own, where it has pairs, else the
photograph with another light on its object, and the truth is the photograph itself. Figures are at the photograph's own
size, not at the backbone's. Some photographs are left as they are, to see what a method does where nothing is to be
done.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from harmony.core.errors import UserError
from harmony.core.files import write_json
from harmony.core.pieces import await_files, make_pieces
from harmony.core.progress import tell
from harmony.core.row import Row
from harmony.data.manifest import manifest_hash
from harmony.evaluation import comparison
from harmony.evaluation.blocks import blocks
from harmony.evaluation.eval_sets import read_truths, subsample
from harmony.evaluation.figures import list_samples
from harmony.evaluation.pages import PageRow, by_row
from harmony.evaluation.report import Report
from harmony.evaluation.study import Study, StudyRun
from harmony.evaluation.tables import flat, pictures, write_table
from harmony.methods.insert import AUTO, Insertion, Result, cut, find_square, insert
from harmony.methods.method import EXEMPLAR, LIGHTS, Method, fingerprint
from harmony.metrics.alignment import shift
from harmony.metrics.fidelity import aggregate, bg_drift, color_de, fmse, ssim, to_psnr
from harmony.models.perception import PairMetric
from harmony.pixels.composites import change_light, copy_paste
from harmony.pixels.exemplars import cut_out
from harmony.pixels.images import crop_resize, limit_size, read_image, resize, write_image
from harmony.pixels.masks import read_mask, resize_mask

LARGEST = 512  # px: longer side at which figures are measured; larger photographs are shrunk
EXAMPLES = 8  # pictures on the figure
SIDE = 192  # px: of a picture on it
COPY_PASTE = "copy_paste"
AS_IT_IS = "_as_it_is"  # ends the name of a composite whose object is under no other light


@dataclass(frozen=True)
class Pair:
    """A ``photograph``, uint8 H x W x 3, and its ``mask``, bool H x W; ``foreground`` shows the object as composed.

    ``composite``: what is to be harmonized. ``is_changed``: whether the object is under another light; otherwise both
    are the photograph.
    """

    row: Row
    photograph: np.ndarray
    foreground: np.ndarray
    composite: np.ndarray
    mask: np.ndarray
    is_changed: bool

    def cut(self, method: Method) -> Insertion:
        """The square that a method fills. UserError for an object that is too small for it."""
        fields = {"caption": self.row.caption, "name": name_composite(self.row, self.is_changed)}
        if EXEMPLAR in method.wants:
            fields["exemplar"] = cut_out(self.foreground, self.mask)
        # the composite is its own background: nothing that a method sees may show the truth's object
        return cut(method.resolution, self.composite, self.composite, self.mask, None, method.radius, **fields)


def name_composite(row: Row, is_changed: bool) -> str:
    """The name by which other programs know a composite."""
    return row.id if is_changed else f"{row.id}{AS_IT_IS}"


def read_pair(row: Row, root: Path, seed: int, is_changed: bool) -> Pair:
    """The pair of a row; where the dataset has no composite, its light is drawn from ``seed`` and the row's id."""
    photograph = read_image(root / row.image)
    mask = read_mask(root / row.mask, (row.width, row.height), resize=True)
    own = read_image(root / row.extras["composite"]) if is_changed and "composite" in row.extras else None
    size = limit_size(row.width, row.height, LARGEST)
    photograph, mask = resize(photograph, *size), resize_mask(mask, *size)
    own = None if own is None else resize(own, *size)
    if own is not None:
        return Pair(row, photograph, own, own, mask, is_changed)
    light = change_light(photograph, np.random.default_rng([seed, row.number])) if is_changed else photograph
    return Pair(row, photograph, light, copy_paste(photograph, light, mask), mask, is_changed)


def score(result: Result, pair: Pair, metrics: Sequence[PairMetric] = ()) -> dict[str, float]:
    """The figures of one result at the photograph's size; its background's drift is that from the composite's.

    ``raw``: of the square that the method returned, before its hole alone was taken; the shift in the photograph's px.
    """
    image, truth, mask = result.image, pair.photograph, pair.mask
    figures = {
        "fmse": fmse(image, truth, mask),
        "color_de": color_de(image, truth, mask),
        "ssim": ssim(image, truth),
        "bg_drift": bg_drift(image, pair.composite, result.hole),
    }
    figures |= {metric.name: metric([image], [truth], [mask])[0] for metric in metrics}
    side = len(result.output)
    inside = np.ones_like(result.hole)  # the photograph: beyond it the square shows its mirror image
    before, hole, inside = (crop_resize(x, result.crop, side) for x in (pair.composite, result.hole, inside))
    drift, moved = (measure(result.output, before, hole | ~inside) for measure in (bg_drift, shift))
    return figures | {"raw/bg_drift": drift, "raw/shift": moved * result.crop.side / side}


@dataclass
class Pairs(Study):
    """The study of pairs, rows as in ``comparison``; its options are those of ``configs/study/pairs.yaml``."""

    run: StudyRun
    rows: dict[str, dict]
    unchanged: int
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        rows = {name: comparison.Row(**facts) for name, facts in self.rows.items()}
        if wrong := [name for name, row in rows.items() if row.best or row.picked]:
            raise UserError(f"study.rows.{wrong[0]}: pairs measure methods alone, leave out best and picked")
        if COPY_PASTE not in rows:
            raise UserError(f"study.rows: add {COPY_PASTE}, with which every row is compared")
        self.details = {name: (row.options or {}).pop("detail", AUTO) for name, row in rows.items()}
        self.rows = rows

    @cached_property
    def items(self) -> list[tuple[Row, bool]]:
        """The rows of the split, each under another light; every ``unchanged``-th once more as it is."""
        rows = subsample(read_truths(self.run.manifest, self.run.split), self.run.limit)
        if len(rows) < 2:
            raise UserError(
                f"{len(rows)} {self.run.split} pictures: pairs need two at least, raise limit= or take more"
            )
        return [(row, True) for row in rows] + [(row, False) for row in rows[:: self.unchanged]]

    @cached_property
    def methods(self) -> dict[str, Method]:
        """Row -> method; rows that lack something are left out with a note."""
        methods = {}
        for name, row in self.rows.items():
            if row.options is None:
                self.notes.append(f"{name}: not measured yet")
            elif row.lacking:
                self.notes.append(f"{name}: left out, give {' and '.join(row.lacking)}")
            else:
                methods[name] = self.run.build(row.options)
                if LIGHTS in methods[name].wants:
                    raise UserError(f"study.rows.{name}: photographs name no lights, choose describer=words")
        return methods

    @cached_property
    def made_of(self) -> str:
        """Hash of all that figures depend on beside the method and its detail."""
        rows = [(r.id, r.sha256, r.caption, r.extras.get("composite_sha256"), changed) for r, changed in self.items]
        return fingerprint(rows, self.run.seed, LARGEST, [metric.protocol for metric in self.run.metrics[0]])

    def file(self, name: str, block: range) -> Path:
        """Where the figures of a block of a row lie."""
        run, settings = self.run, fingerprint(self.made_of, self.details[name])
        return run.folder / "outputs" / self.methods[name].fingerprint[:16] / settings[:16] / f"{block.start:05d}.json"

    def results(self, name: str, items: Sequence[tuple[Row, bool]]) -> list[tuple[Pair, Result | UserError]]:
        """The results of a row; an error for an object that is too small for it, or words that are too long."""
        pairs = [read_pair(row, self.run.manifest.parent, self.run.seed, changed) for row, changed in items]
        return list(zip(pairs, self.insert(name, pairs), strict=True))

    def insert(self, name: str, pairs: Sequence[Pair]) -> list[Result | UserError]:
        """Insert some pairs together; where that fails, each alone."""
        method = self.methods[name]
        try:
            return insert(method, [pair.cut(method) for pair in pairs], self.run.seed, 0, self.details[name])
        except UserError as error:
            return [error] if len(pairs) == 1 else [self.insert(name, [pair])[0] for pair in pairs]

    def make(self, name: str, block: range) -> None:
        """Measure one row on some of the items; an item that it cannot take is stored as the reason."""
        results = self.results(name, [self.items[i] for i in block])
        figures = [str(r) if isinstance(r, UserError) else score(r, pair, self.run.metrics[0]) for pair, r in results]
        write_json(self.file(name, block), figures)

    def read(self, name: str) -> list[dict[str, float] | str]:
        """The figures of a row, an item each."""
        return [row for block in blocks(len(self.items)) for row in json.loads(self.file(name, block).read_text())]

    def measure(self) -> Report:
        """The report; on other ranks than the first the share of outputs alone is made."""
        run = self.run
        count = sum(changed for _, changed in self.items)
        line = (
            f"{run.name}: n = {count} {run.split} photographs of {run.manifest.parent.name}, object under another "
            f"light, and {len(self.items) - count} as they are; {run.protocol}"
        )
        if run.rank == 0:
            tell(line)
        pieces = {self.file(name, b): (name, b) for name in self.methods for b in blocks(len(self.items))}
        sizes = {path: len(block) for path, (_, block) in pieces.items()}

        def make(path: Path) -> None:
            self.make(*pieces[path])

        make_pieces(
            "pairs", sizes, Path.exists, make, "pictures", run.rank, run.world, detail=lambda path: pieces[path][0]
        )
        await_files(list(pieces))
        if run.rank > 0:
            return Report()
        table, samples = self.table()
        metrics, lines = run.metrics
        notes = [line, *self.notes, *lines, *(metric.protocol for metric in metrics)]
        if "poisson" in table:
            notes.append("poisson: the object stands where it stood, so that its rim gives the truth away")
        text = write_table(run.folder, table, "method", notes, every=True)
        prints = {name: method.fingerprint for name, method in self.methods.items()}
        facts = {"count": count, "methods": prints, "manifest": manifest_hash(run.manifest)}
        figure, rows = self.draw(set(samples))
        return Report(flat(table), facts, text, [figure], rows, samples)

    def write_inputs(self, folder: Path) -> None:
        def make(path: Path) -> None:
            row, is_changed = items[path]
            pair = read_pair(row, self.run.manifest.parent, self.run.seed, is_changed)
            write_image(folder / "masks" / path.name, pair.mask)
            write_image(path, pair.composite)

        names = [name_composite(*item) for item in self.items]
        items = {folder / "composites" / f"{name}.png": item for name, item in zip(names, self.items, strict=True)}
        captions = {name: row.caption for name, (row, _) in zip(names, self.items, strict=True)}
        for part in ("composites", "masks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        make_pieces("inputs", dict.fromkeys(items, 1), lambda path: False, make, "composites", every=50)
        write_json(folder / "captions.json", captions)

    def table(self) -> tuple[dict[str, dict[str, float]], dict[str, dict]]:
        """Row -> figures, over the photographs that all rows can take; and the samples of a report."""
        figures = {name: self.read(name) for name in self.methods}
        failures = [
            (name, rows[i], i) for name, rows in figures.items() for i in range(len(rows)) if isinstance(rows[i], str)
        ]
        common = sorted({*range(len(self.items))} - {i for _, _, i in failures})
        if failures:
            name, reason, i = failures[0]
            count = len(self.items) - len(common)
            self.notes.append(f"{count} left out for all rows, such as {self.items[i][0].id} for {name}: {reason}")
        changed = [i for i in common if self.items[i][1]]
        unchanged = [i for i in common if not self.items[i][1]]
        if len(changed) < 2:
            raise UserError(f"fewer than two pictures are left: {'; '.join(self.notes)}")
        table = {}
        for name, rows in figures.items():
            parts = [[of[i] for i in changed] for of in (rows, figures[COPY_PASTE])]
            table[name] = summarize(*parts)
            if unchanged:
                table[name]["unchanged/fmse"] = float(np.mean([rows[i]["fmse"] for i in unchanged]))
        photographs = [self.items[i][0] for i in changed]
        rows_of = {name: [rows[i] for i in changed] for name, rows in figures.items()}
        return table, list_samples([row.id for row in photographs], [row.caption for row in photographs], rows_of)

    def draw(self, ids: set[str]) -> tuple[Path, list[PageRow]]:
        """``figure.png``: the composite, each row and the photograph, around the objects of some of the photographs.

        The same items, whole, are the rows of the page.
        """
        few = subsample([item for item in self.items if item[1] and item[0].id in ids], EXAMPLES)
        columns: dict[str, list[np.ndarray]] = {}
        for name in self.methods:
            results = self.results(name, few)
            images = [p.composite if isinstance(r, UserError) else r.image for p, r in results]
            columns[name] = images
        pairs = [pair for pair, _ in results]
        columns["truth"] = [pair.photograph for pair in pairs]
        rows = by_row([row.id for row, _ in few], [row.caption for row, _ in few], columns)
        path = self.run.folder / "figure.png"
        squares, cells = [find_square(pair.mask) for pair in pairs], []
        for column in columns.values():
            cells.append([crop_resize(y, square, SIDE) for y, square in zip(column, squares, strict=True)])
        pictures(path, list(zip(*cells, strict=True)), list(columns))
        return path, rows


def summarize(rows: Sequence[dict[str, float]], references: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures of one row of the table, from those of its pictures and of copy and paste.

    ``better``: share of the pictures in which it is nearer to the truth; ``gain``: by how much, as the mean difference
    in fmse with its standard error.
    """
    errors, others = (np.array([row["fmse"] for row in part]) for part in (rows, references))
    gain = others - errors
    means = aggregate([row | {"fpsnr": to_psnr(row["fmse"])} for row in rows])
    spread = {"gain": gain.mean(), "gain_se": gain.std(ddof=1) / np.sqrt(len(gain))}
    extra = {"fmse_median": np.median(errors), "better": (gain > 0).mean()} | spread
    return means | {name: float(value) for name, value in extra.items()}
