"""User studies: a page on which people choose between two results, and Bradley-Terry scores of their choices.

Pairwise forced choice: of one picture the results of two methods stand side by side, unnamed, and one has to be chosen.
The page is one file that needs no network; it hands each rater a file of answers. The probability that method i is
chosen over j is p_i / (p_i + p_j) (Bradley and Terry, 1952); a score is log p_i, so that a lead of d means being chosen
in 1 / (1 + exp(-d)) of the trials.

A vision-language model can answer the same trials, each in both orders; its answers are never counted with people's.
"""

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.sparse.csgraph import connected_components

from harmony.core.errors import UserError
from harmony.core.files import PACKAGE, write_json, write_text
from harmony.core.foreign import read_json
from harmony.core.pieces import await_files, make_pieces
from harmony.evaluation.answers import (
    SCHEMA,
    Answer,
    Rater,
    Share,
    answer_files,
    answers_of,
    compare_orders,
    compare_people,
    compare_with_people,
    count_wins,
    read_rater,
    write_rater,
)
from harmony.evaluation.eval_sets import subsample
from harmony.evaluation.pages import ROWS, PageRow, fill_template, shrink
from harmony.evaluation.report import Report
from harmony.evaluation.study import Study, StudyRun
from harmony.evaluation.tables import Table, flat, write_table
from harmony.models.vision_language import FORM, LABELS, REFERENCE, SIDE, VisionLanguageJudge, identify_model
from harmony.pixels.color_profiles import read_in_space
from harmony.pixels.images import read_image, sha256

TEMPLATE = PACKAGE / "assets" / "user_study.html"
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
COMPOSITE = "composite"  # study.reference: what harmonize was given
PRIOR = 0.5  # wins each way and pair where no maximum exists; for two methods the correction of Haldane and Anscombe
DRAWS = 1000  # of the bootstrap
FEW = 10  # raters; with 3 the bootstrap's intervals held the truth in 76 % of simulated studies, with 5 in 84, 20 in 93
NEXT = (
    "no scores by people yet: hand the page to the raters, gather the answers_*.json that they save in one folder, and "
    "give the same command with study.answers=FOLDER"
)
JUDGE = "judge"  # begins the names of the figures of a model's answers
JUDGE_OPTION = "study.judge"
EVERY = 20  # questions a line of progress
UNCONNECTED = (
    "the graph of wins is not strongly connected (some methods were always, or never, chosen over the others, or never "
    f"met them), so that no maximum likelihood exists: {PRIOR:g} wins each way were added to every pair, and the "
    "scores are drawn towards 0"
)
COLORS = ("#1f6f8b", "#c8553d")  # of people and of a judge on the figure
ROUNDS, TOLERANCE = 10_000, 1e-9  # of the MM algorithm, in log-strength


# --- Bradley-Terry


def with_maximum(wins: np.ndarray) -> np.ndarray:
    """``wins`` (K x K) themselves where the likelihood has a maximum, else with PRIOR more each way and pair.

    It has one if and only if the graph of wins is strongly connected: however the methods are parted in two, some of
    either side was chosen over some of the other (Ford, 1957).
    """
    if connected_components(wins, connection="strong")[0] == 1:
        return wins
    return wins + PRIOR * (1 - np.eye(len(wins)))


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Scores (... x K), mean 0, of maximum likelihood; ``wins[..., i, j]``: how often i was chosen over j.

    The MM algorithm of Hunter 2004, eq. 3. Each graph of wins has to be strongly connected (``with_maximum``).
    """
    win_counts, trials = wins.sum(-1), wins + wins.swapaxes(-1, -2)
    scores = np.zeros(win_counts.shape)
    for _ in range(ROUNDS):
        p, last = np.exp(scores), scores
        scores = np.log(win_counts / (trials / (p[..., :, None] + p[..., None, :])).sum(-1))
        scores -= scores.mean(-1, keepdims=True)
        if np.abs(scores - last).max() < TOLERANCE:
            break
    return scores


def intervals(units: np.ndarray, seed: int, draws: int = DRAWS) -> np.ndarray:
    """95 % intervals (2 x K) of the scores, by percentiles of a bootstrap over ``units`` (U x K x K).

    A unit is the wins of one rater, or one answer. A draw without a maximum is fitted as ``with_maximum`` says.
    """
    counts = np.random.default_rng(seed).multinomial(len(units), np.full(len(units), 1 / len(units)), draws)
    samples = np.tensordot(counts, units, 1).astype(float)
    return np.percentile(bradley_terry(np.stack([with_maximum(wins) for wins in samples])), [2.5, 97.5], axis=0)


# --- pictures


def results_of(folder: Path, key: str) -> dict[str, Path]:
    """Name -> file: NAME/harmonized.png of a run of ``harmonize dir=``, or else NAME.png or NAME.jpg."""
    if not folder.is_dir():
        raise UserError(f"{key}={folder}: there is no such folder")
    if results := {file.parent.name: file for file in sorted(folder.glob("*/harmonized.png"))}:
        return results
    if (folder / "harmonized.png").exists():
        raise UserError(f"{key}={folder} holds one composite; harmonize dir=FOLDER makes many, each by its name")
    files: dict[str, Path] = {}
    for file in sorted(file for file in folder.iterdir() if file.suffix.lower() in TYPES):
        if file.stem in files:
            raise UserError(f"{key}={folder} has both {files[file.stem].name} and {file.name}: keep one of them")
        files[file.stem] = file
    if not files:
        raise UserError(f"{key}={folder} has neither NAME/harmonized.png nor NAME.png or NAME.jpg")
    return files


def in_all(results: Mapping[str, Mapping[str, Path]]) -> tuple[list[str], list[str]]:
    """(names that every method has, notes on the others)."""
    every = sorted(set().union(*results.values()))
    lacking = {name: [method for method, files in results.items() if name not in files] for name in every}
    common = [name for name, methods in lacking.items() if not methods]
    if not common:
        raise UserError(f"no picture has the same name in all of {', '.join(results)}: nothing to compare")
    missing = [f"{name} ({', '.join(methods)})" for name, methods in lacking.items() if methods]
    return common, [f"left out, missing in some methods: {', '.join(missing)}"] if missing else []


def check_alike(name: str, files: Mapping[str, Path]) -> None:
    """UserError for results of one picture that are of different sizes, or that cannot be read."""
    sizes = {method: read_image(file).shape[1::-1] for method, file in files.items()}
    if len(set(sizes.values())) > 1:
        each = ", ".join(f"{w} x {h} in {method}" for method, (w, h) in sizes.items())
        raise UserError(f"picture {name} is {each}: raters would see which is which, bring all to one size")


def references_of(reference: str | None, results: Mapping[str, Mapping[str, Path]]) -> dict[str, Path]:
    """Name -> picture shown above both: of a folder, or the composite beside the first result that has one."""
    if reference is None:
        return {}
    if reference != COMPOSITE:
        return results_of(Path(reference), "study.reference")
    beside: dict[str, Path] = {}
    for name, file in (item for files in results.values() for item in files.items()):
        composite = file.with_name("composite.png")
        if file.name == "harmonized.png" and composite.exists():
            beside.setdefault(name, composite)
    return beside


def digest(content: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of ``content`` as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def data_uri(file: Path) -> str:
    """The file itself, byte for byte, for a page without a network."""
    return f"data:{TYPES[file.suffix.lower()]};base64,{base64.b64encode(file.read_bytes()).decode()}"


# --- the study


@dataclass
class UserStudy(Study):
    """The study of ``experiment=user_study``; it needs neither dataset nor backbone.

    The options are those of ``configs/study/user_study.yaml``. Raters see codes in place of the methods; which is which
    stands in the run folder's ``study.json`` alone.
    """

    run: StudyRun
    methods: dict[str, str]
    answers: str | list[str] | None
    question: str
    reference: str | None
    trials: int | None
    pixelated: bool
    judge: str | None
    judgments: str

    def __post_init__(self) -> None:
        self.check()
        self.methods = {str(name): folder for name, folder in self.methods.items()}
        self.results = {m: results_of(Path(f), f"study.methods.{m}") for m, f in self.methods.items()}
        common, self.notes = in_all(self.results)
        self.pictures = common[: self.run.limit]
        references = references_of(self.reference, self.results)
        self.references = {name: references[name] for name in self.pictures if name in references}
        if references and len(self.references) < len(self.pictures):
            lacking = ", ".join(name for name in self.pictures if name not in references)
            self.notes.append(f"without a reference: {lacking}")
        for name in self.pictures:
            check_alike(name, {method: files[name] for method, files in self.results.items()})
        for file in self.references.values():
            read_image(file)
        parts = {f"methods/{m}": {n: files[n] for n in self.pictures} for m, files in self.results.items()}
        parts |= {"reference": self.references}
        self.hashes = {part: {n: sha256(file) for n, file in files.items()} for part, files in parts.items()}
        self.made_of = {part: digest(hashes) for part, hashes in self.hashes.items()}
        # how many trials a rater has is no part of it: answers of longer and shorter sessions belong together
        self.id = digest([SCHEMA, self.made_of, self.question, self.pixelated])
        self.codes = {digest([self.id, method])[:8]: method for method in self.methods}
        every = len(self.pictures) * len(list(combinations(self.methods, 2)))
        self.trials = min(every, self.trials or every)  # of each rater

    def check(self) -> None:
        """UserError for options that no study can be made of."""
        methods, answers, limit = self.methods, self.answers, self.run.limit
        if not isinstance(methods, dict) or len(methods) < 2 or not all(isinstance(f, str) for f in methods.values()):
            raise UserError("give at least two folders of results: study.methods='{ours: FOLDER, paper: FOLDER}'")
        for key, count in (("limit", limit), ("study.trials", self.trials)):
            if count is not None and (type(count) is not int or count < 1):
                raise UserError(f"{key}={count}: give a whole number from 1, or null for all")
        if not isinstance(self.question, str) or not self.question.strip():
            raise UserError("study.question is empty: say what the raters are to choose by")
        if not isinstance(self.reference, str | None):
            raise UserError(f"study.reference={self.reference}: give {COMPOSITE}, a folder of pictures or null")
        if not all(isinstance(a, str) for a in (answers if isinstance(answers, list) else [answers or ""])):
            raise UserError(f"study.answers={answers}: give a file, a folder of such files, or a list of both")

    def page(self) -> str:
        """The whole page, in which methods are codes, sorted by them."""
        codes = sorted(self.codes)
        pictures = [
            {
                "name": name,
                "reference": data_uri(self.references[name]) if name in self.references else None,
                "results": [data_uri(self.results[self.codes[code]][name]) for code in codes],
            }
            for name in self.pictures
        ]
        settings = {"question": self.question, "pixelated": self.pixelated, "trials": self.trials}
        study = {"schema": SCHEMA, "study": self.id, **settings, "methods": codes, "pictures": pictures}
        return fill_template(TEMPLATE, "STUDY_AS_JSON", study)

    def raters(self) -> list[Rater]:
        """Who answered, of all files. UserError for two files of one rater, and for answers of two models."""
        raters: dict[str, tuple[Path, Rater]] = {}
        for file in answer_files(self.answers) if self.answers else ():
            rater = read_rater(file, self.id, self.pictures, self.codes)
            if rater.name in raters:
                raise UserError(
                    f"{raters[rater.name][0]} and {file} are both of rater {rater.name}: keep the later one"
                )
            raters[rater.name] = file, rater
        files = {rater.model: file for file, rater in raters.values() if rater.model is not None}
        if len(files) + (self.judge is not None) > 1:
            model, file = next(iter(files.items()))
            raise UserError(f"{file} holds answers of {model}, and there is another judge: take one of them out")
        return [rater for _, rater in raters.values()]

    def gather(self) -> tuple[list[Rater], list[Rater], list[str]]:
        """(people, the judge in both orders, notes); a judge that cannot be had is left out where there are people."""
        raters = self.raters()
        people = [rater for rater in raters if rater.model is None]
        if self.judge is None:
            return people, [rater for rater in raters if rater.model is not None], []
        pairs = list(combinations(self.methods, 2))
        orders = [[(name, *pair[::step]) for name in self.pictures for pair in pairs] for step in (1, -1)]
        try:  # what fails for one process fails for all; an error of a single question ends the run
            place = Path(self.judgments) / digest(identify_model(self.judge, JUDGE_OPTION))
            files = {question: self.judgment_file(place, *question) for order in orders for question in order}
            is_complete = all(file.exists() for file in files.values())
            judge = None if is_complete else VisionLanguageJudge(self.judge, JUDGE_OPTION, self.run.device)
        except UserError as error:
            if not people:
                raise
            return people, [], [f"{JUDGE}: left out, {error}"]
        return people, self.ask_judge(orders, files, judge), []

    def ask_judge(
        self, orders: list[list[tuple]], files: dict[tuple, Path], judge: VisionLanguageJudge | None
    ) -> list[Rater]:
        """The answers of ``judge`` to every trial, each order a rater; those that are kept are not asked for.

        An answer is kept, in one of ``files``, by what it depends on: the model, its prompt and the pictures, whatever
        the study.
        """
        questions = {file: question for question, file in files.items()}

        def make(file: Path) -> None:
            self.ask(judge, file, *questions[file])

        sizes = dict.fromkeys(questions, 1)
        make_pieces(JUDGE, sizes, Path.exists, make, "questions", self.run.rank, self.run.world, every=EVERY)
        await_files(list(questions))
        answers = [[read_judgment(files[question], *question) for question in order] for order in orders]
        return [Rater(f"{self.judge} in order {n}", own, self.judge) for n, own in enumerate(answers, 1)]

    def judgment_file(self, place: Path, picture: str, *pair: str) -> Path:
        """Where the answer to one question, the methods in their order, is kept."""
        results = [self.hashes[f"methods/{method}"][picture] for method in pair]
        prompt = [REFERENCE, LABELS, self.question, FORM, SIDE]
        return place / f"{digest([prompt, self.hashes['reference'].get(picture), results])}.json"

    def ask(self, judge: VisionLanguageJudge, file: Path, picture: str, *pair: str) -> None:
        """Ask one question and keep the answer."""
        reference = self.references.get(picture)
        reference = None if reference is None else read_in_space(reference, None).pixels
        pictures = [read_in_space(self.results[method][picture], None).pixels for method in pair]
        start = time.monotonic()
        chosen = judge.choose(self.question, pictures, reference)
        write_json(file, {"chosen": chosen, "milliseconds": round(1000 * (time.monotonic() - start))})

    def score(self, groups: Sequence[Sequence[Answer]], unit: str, alone: str) -> tuple[Table, list[str]]:
        """(table, notes): score with its interval, share of comparisons that were won and their number.

        ``groups``: answers that belong together, each of one ``unit``; where there is one, its answers stand alone.
        """
        units = groups if len(groups) > 1 else [[answer] for answers in groups for answer in answers]
        units = np.stack([count_wins(unit, list(self.methods)) for unit in units])
        wins = units.sum(0)
        regular_wins = with_maximum(wins)
        columns = [bradley_terry(regular_wins), *intervals(units, self.run.seed), wins.sum(1), (wins + wins.T).sum(1)]
        table = {}
        for method, score, low, high, victories, trials in zip(self.methods, *np.array(columns).tolist(), strict=True):
            share = {"win_share": victories / trials} if trials else {}
            table[method] = {"score": score, "low": low, "high": high, **share, "comparisons": trials}
        over = f"{len(groups)} {unit}" if len(groups) > 1 else alone
        notes = [f"score: Bradley-Terry log-strength, mean 0; low and high: 95 %, bootstrap over {over}"]
        if 1 < len(groups) < FEW:
            notes.append(f"with fewer than {FEW} {unit} these intervals are too narrow")
        return table, notes if regular_wins is wins else [*notes, UNCONNECTED]

    def score_people(self, people: Sequence[Rater]) -> tuple[Table, list[str]]:
        """(table, notes) of what people chose."""
        every = answers_of(people)
        left = np.mean([answer.chosen == answer.left for answer in every])
        seconds = median(answer.milliseconds for answer in every) / 1000
        line = f"raters: {len(people)}, answers: {len(every)} ({left:.0%} the left one), {seconds:.1f} s each (median)"
        groups = [rater.answers for rater in people]
        table, notes = self.score(groups, "raters", "the answers of one rater, who is not all people")
        return table, [line, *notes]

    def score_judge(self, judge: Sequence[Rater]) -> tuple[Table, list[str]]:
        """(table, notes) of what a model chose in both orders."""
        every = answers_of(judge)
        first = np.mean([answer.chosen == answer.left for answer in every])
        line = f"by {judge[0].model}, not by people; answers: {len(every)} ({first:.0%} the first one)"
        groups = [group for name in self.pictures if (group := [a for a in every if a.picture == name])]
        table, notes = self.score(groups, "pictures", "the answers on one picture")
        return table, [f"{JUDGE}: {note}" for note in (line, *notes)]

    def score_all(
        self, people: Sequence[Rater], judge: Sequence[Rater]
    ) -> tuple[dict[str, Table], list[str], dict[str, Share | None]]:
        """(tables by the prefix of their columns, notes, agreement) of those who have answered."""
        tables, notes, shares = {}, [], {}
        if people:
            tables[""], notes = self.score_people(people)
        if judge:
            tables[f"{JUDGE}/"], lines = self.score_judge(judge)
            shares = measure_agreement(people, judge)
            notes = [*notes, *lines, *describe_agreement(shares, len(people))]
        return tables, notes, shares

    def measure(self) -> Report:
        """The report; the page, ``study.json``, table, figure and a judge's answers are in the run folder."""
        people, judge, lines = self.gather()
        if self.run.rank > 0:
            return Report()
        page, figures = self.write_files(judge), []
        tables, notes, shares = self.score_all(people, judge)
        if tables:
            figures.append(self.run.folder / "figure.png")
            draw(figures[0], {f"by {judge[0].model if who else 'people'}": part for who, part in tables.items()})
        table = join_tables(tables) or {method: {"comparisons": 0.0} for method in self.methods}
        counts = f"n = {len(self.pictures)} pictures, {len(self.methods)} methods"
        size = f"{self.trials} trials a rater, {page.stat().st_size / 1e6:.1f} MB"
        notes = [f"{self.run.name} {self.id}: {counts}, seed {self.run.seed}", *self.notes, *lines, *notes]
        notes += [NEXT] * (not people) + [f"the page ({size}), for any browser:", str(page)]
        text = write_table(self.run.folder, table, "method", notes, every=True)
        names = sorted(rater.name for rater in (*people, *judge))
        facts = {"study": self.id, "raters": names, "count": len(self.pictures), "made_of": self.made_of}
        return Report(flat(table) | to_figures(shares), facts, text, figures, self.page_rows())

    def page_rows(self) -> list[PageRow]:
        """The rows of the report's page; it names the methods and is not the page for raters."""
        rows = []
        for name in subsample(self.pictures, ROWS):
            files = {"reference": self.references[name]} if name in self.references else {}
            files |= {method: results[name] for method, results in self.results.items()}
            images = {title: shrink(read_in_space(file, None).pixels) for title, file in files.items()}
            rows.append(PageRow(name, images, name))
        return rows

    def write_files(self, judge: Sequence[Rater]) -> Path:
        """Write the page, what its codes mean and the answers of a judge; returns the page's path."""
        page = self.run.folder / "study.html"
        write_text(page, self.page())
        key = {"study": self.id, "question": self.question, "methods": self.codes, "pictures": self.pictures}
        write_json(self.run.folder / "study.json", key)
        for number, rater in enumerate(judge, 1):
            write_rater(self.run.folder / JUDGE / f"answers_{number}.json", rater, self.id, self.codes)
        return page


def read_judgment(file: Path, picture: str, first: str, second: str) -> Answer:
    """The answer that is kept in ``file``. UserError for a file that holds none."""
    record = read_json(file)
    if not isinstance(record, dict) or not {"chosen", "milliseconds"} <= set(record) or record["chosen"] not in (0, 1):
        raise UserError(f"{file} holds no answer of a judge: delete it, the same command asks again")
    return Answer(picture, first, second, (first, second)[record["chosen"]], record["milliseconds"])


def join_tables(tables: Mapping[str, Table]) -> dict[str, dict[str, float]]:
    """Tables of the same rows side by side, each with its prefix before the names of its columns."""
    rows: dict[str, dict[str, float]] = {}
    for prefix, table in tables.items():
        for method, row in table.items():
            rows.setdefault(method, {}).update({f"{prefix}{name}": value for name, value in row.items()})
    return rows


# --- agreement


def measure_agreement(people: Sequence[Rater], judge: Sequence[Rater]) -> dict[str, Share | None]:
    """How often a judge agrees with itself and with people, and people with one another, by the figures' names."""
    return {
        f"{JUDGE}/consistency": compare_orders(answers_of(judge)),
        f"{JUDGE}/agreement": compare_with_people(answers_of(judge), people),
        "people/agreement": compare_people(people),
    }


def to_figures(shares: Mapping[str, Share | None]) -> dict[str, float]:
    """Each share with its standard error and the number of its trials."""
    ends = ("", "_se", "_n")
    return {
        f"{name}{end}": value
        for name, share in shares.items()
        if share is not None
        for end, value in zip(ends, share, strict=True)
    }


def describe_agreement(shares: Mapping[str, Share | None], people: int) -> list[str]:
    """Lines about the shares of ``measure_agreement`` among so many people."""
    orders, agreement, others = shares.values()
    lines = []
    if orders is not None:
        lines.append(
            f"{JUDGE}: in {orders} of the trials the same choice in both orders; in the others the place of a picture "
            "decides (position bias), and each of the two methods wins once"
        )
    if people and agreement is None:
        lines.append(f"{JUDGE}: no trial has a majority of people and the same choice of the judge in both orders")
    if agreement is not None:
        lines.append(
            f"{JUDGE}: it chooses as most people do in {agreement} of the trials that have a majority of people and "
            "its same choice in both orders (by chance 50%; ±: standard error)"
        )
    if others is not None:
        lines.append(f"for comparison: one person chooses as most of the others do in {others} of the answers")
    return lines


def draw(path: Path, tables: Mapping[str, Table]) -> None:
    """Scores with their intervals, the best of the first table at the top; ``tables``: who chose -> what came of it."""
    import matplotlib
    from matplotlib.figure import Figure

    first = next(iter(tables.values()))
    rows = sorted(first, key=lambda method: first[method]["score"])
    with matplotlib.rc_context({"text.parse_math": False}):  # a name with a dollar sign is no formula
        figure = Figure(figsize=(6, 1.2 + 0.4 * len(rows)), layout="constrained")
        axis = figure.subplots()
        for n, (name, table) in enumerate(tables.items()):
            scores, low, high = ([table[method][key] for method in rows] for key in ("score", "low", "high"))
            y, color = np.arange(len(rows)) - 0.2 * n, COLORS[n]
            axis.hlines(y, low, high, color=color, linewidth=2)
            axis.plot(scores, y, "o", color=color, label=name)
        axis.axvline(0, color="gray", linewidth=0.8, zorder=0)
        axis.set(xlabel="Bradley-Terry score (log-strength, mean 0), 95 % interval", ylim=(-0.6, len(rows) - 0.4))
        axis.set_yticks(range(len(rows)), rows)
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize="small")
        figure.savefig(path, dpi=120)
