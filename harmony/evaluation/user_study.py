"""User studies: a page on which people choose between two results, and Bradley-Terry scores of their choices.

Pairwise forced choice: of one picture the results of two methods stand side by side, unnamed, and one has to be chosen.
The page is one file that needs no network; it hands each rater a file of answers. The probability that method i is
chosen over j is p_i / (p_i + p_j) (Bradley and Terry, 1952); a score is log p_i, so that a lead of d means being chosen
in 1 / (1 + exp(-d)) of the trials.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
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
from harmony.evaluation.report import Report
from harmony.evaluation.study import Study, StudyRun
from harmony.evaluation.tables import flat, write_table
from harmony.pixels.images import read_image, sha256

TEMPLATE = PACKAGE / "assets" / "user_study.html"
SCHEMA = 1  # of the answers' files
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
COMPOSITE = "composite"  # study.reference: what harmonize was given
PRIOR = 0.5  # wins each way and pair where no maximum exists; for two methods the correction of Haldane and Anscombe
DRAWS = 1000  # of the bootstrap
FEW = 10  # raters; with 3 the bootstrap's intervals held the truth in 76 % of simulated studies, with 5 in 84, 20 in 93
NEXT = (
    "no scores yet: hand the page to the raters, gather the answers_*.json that they save in one folder, and give the "
    "same command with study.answers=FOLDER"
)
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


# --- answers


@dataclass(frozen=True)
class Answer:
    """One trial: methods at the left and right, which of them was chosen, and after how many milliseconds."""

    picture: str
    left: str
    right: str
    chosen: str
    milliseconds: float

    @property
    def passed_over(self) -> str:
        return self.right if self.chosen == self.left else self.left


def count_wins(answers: Iterable[Answer], methods: Sequence[str]) -> np.ndarray:
    """K x K: how often the method of the row was chosen over that of the column."""
    wins = np.zeros((len(methods), len(methods)))
    for answer in answers:
        wins[methods.index(answer.chosen), methods.index(answer.passed_over)] += 1
    return wins


def read_answer(entry: Any, pictures: Sequence[str], codes: Mapping[str, str]) -> Answer:
    """One entry of an answers' file, ``codes`` turned into names of methods. Raises ValueError with what is wrong."""
    if not isinstance(entry, dict) or set(entry) != set(Answer.__annotations__):
        raise ValueError(f"holds other keys than {', '.join(Answer.__annotations__)}")
    if entry["picture"] not in pictures:
        raise ValueError(f"is of an unknown picture {entry['picture']!r}")
    sides = entry["left"], entry["right"]
    for code in sides:
        if not isinstance(code, str) or code not in codes:
            raise ValueError(f"is of an unknown method {code!r}")
    if len(set(sides)) != 2 or entry["chosen"] not in sides:
        raise ValueError("does not choose between two methods")
    if type(entry["milliseconds"]) not in (int, float) or not entry["milliseconds"] >= 0:
        raise ValueError("has no time in milliseconds")
    left, right, chosen = (codes[entry[key]] for key in ("left", "right", "chosen"))
    return Answer(entry["picture"], left, right, chosen, entry["milliseconds"])


def read_rater(file: Path, study: str, pictures: Sequence[str], codes: Mapping[str, str]) -> tuple[str, list[Answer]]:
    """(rater, answers) of a file that the page of ``study`` has handed out. UserError for any other, by its name."""
    record = read_json(file)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UserError(f"{file} holds no answers of a user study (schema {SCHEMA}); take it out of study.answers")
    if record.get("study") != study:
        raise UserError(
            f"{file} belongs to study {record.get('study')}, this is {study}: give the methods, pictures, names, "
            "question and limit that its page was made of"
        )
    entries = record.get("answers")
    if not isinstance(record.get("rater"), str) or not isinstance(entries, list) or not entries:
        raise UserError(f"{file} names no rater or holds no answers; take it out of study.answers")
    answers, trials = [], set()
    for n, entry in enumerate(entries):
        try:
            answer = read_answer(entry, pictures, codes)
            trial = answer.picture, frozenset((answer.left, answer.right))
            if trial in trials:
                raise ValueError("repeats an earlier one")
        except ValueError as error:
            raise UserError(f"{file}: answer {n} {error}; ask the rater for the file again") from None
        answers.append(answer)
        trials.add(trial)
    return record["rater"], answers


def answer_files(places: str | Sequence[str]) -> list[Path]:
    """The files that ``study.answers`` names: a file, a folder of ``*.json``, or a list of both."""
    files = []
    for place in [places] if isinstance(places, str) else places:
        files_in = sorted(Path(place).glob("*.json")) if Path(place).is_dir() else [Path(place)]
        if not files_in:
            raise UserError(f"study.answers={place}: there are no .json files in it")
        files += files_in
    return files


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
        self.made_of = {part: digest({n: sha256(file) for n, file in files.items()}) for part, files in parts.items()}
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
        text = json.dumps(study).replace("<", "\\u003c")  # nothing in it may end the script element
        return TEMPLATE.read_text(encoding="utf-8").replace("STUDY_AS_JSON", text)

    def raters(self) -> dict[str, list[Answer]]:
        """Rater -> answers, of all files. UserError for two files of one rater."""
        files_of: dict[str, tuple[Path, list[Answer]]] = {}
        for file in answer_files(self.answers) if self.answers else ():
            rater, answers = read_rater(file, self.id, self.pictures, self.codes)
            if rater in files_of:
                raise UserError(f"{files_of[rater][0]} and {file} are both of rater {rater}: keep the later one")
            files_of[rater] = file, answers
        return {rater: answers for rater, (_, answers) in files_of.items()}

    def score(self, raters: Mapping[str, Sequence[Answer]]) -> tuple[dict[str, dict[str, float]], list[str]]:
        """(table, notes): score with its interval, share of comparisons that were won and their number."""
        every = [answer for answers in raters.values() for answer in answers]
        units = raters.values() if len(raters) > 1 else [[answer] for answer in every]
        units = np.stack([count_wins(unit, list(self.methods)) for unit in units])
        wins = units.sum(0)
        regular_wins = with_maximum(wins)
        columns = [bradley_terry(regular_wins), *intervals(units, self.run.seed), wins.sum(1), (wins + wins.T).sum(1)]
        table = {}
        for method, score, low, high, victories, trials in zip(self.methods, *np.array(columns).tolist(), strict=True):
            share = {"win_share": victories / trials} if trials else {}
            table[method] = {"score": score, "low": low, "high": high, **share, "comparisons": trials}
        return table, self.remarks(raters, every, regular_wins is wins)

    def remarks(self, raters: Mapping, every: Sequence[Answer], connected: bool) -> list[str]:
        """What has to be known to read the scores."""
        left = np.mean([answer.chosen == answer.left for answer in every])
        seconds = median(answer.milliseconds for answer in every) / 1000
        over = f"{len(raters)} raters" if len(raters) > 1 else "the answers of one rater, who is not all people"
        notes = [
            f"raters: {len(raters)}, answers: {len(every)} ({left:.0%} the left one), {seconds:.1f} s each (median)",
            f"score: Bradley-Terry log-strength, mean 0; low and high: 95 %, bootstrap over {over}",
        ]
        if 1 < len(raters) < FEW:
            notes.append(f"with fewer than {FEW} raters these intervals are too narrow")
        if not connected:
            notes.append(
                "the graph of wins is not strongly connected (some methods were always, or never, chosen over the "
                f"others, or never met them), so that no maximum likelihood exists: {PRIOR:g} wins each way were added "
                "to every pair, and the scores are drawn towards 0"
            )
        return notes

    def measure(self) -> Report:
        """The report; the page, ``study.json``, table and figure are in the run folder."""
        if self.run.rank > 0:
            return Report()
        raters = self.raters()
        page, figures = self.run.folder / "study.html", []
        write_text(page, self.page())
        key = {"study": self.id, "question": self.question, "methods": self.codes, "pictures": self.pictures}
        write_json(self.run.folder / "study.json", key)
        counts = f"n = {len(self.pictures)} pictures, {len(self.methods)} methods"
        if raters:
            table, notes = self.score(raters)
            figures.append(self.run.folder / "figure.png")
            draw(figures[0], table)
        else:
            table, notes = {method: {"comparisons": 0.0} for method in self.methods}, [NEXT]
        size = f"{self.trials} trials a rater, {page.stat().st_size / 1e6:.1f} MB"
        notes = [f"{self.run.name} {self.id}: {counts}, seed {self.run.seed}", *self.notes, *notes]
        notes += [f"the page ({size}), for any browser:", str(page)]
        text = write_table(self.run.folder, table, "method", notes, every=True)
        facts = {"study": self.id, "raters": sorted(raters), "count": len(self.pictures), "made_of": self.made_of}
        return Report(flat(table), facts, text, figures)


def draw(path: Path, table: Mapping[str, Mapping[str, float]]) -> None:
    """Scores with their intervals, the best at the top."""
    from matplotlib.figure import Figure

    rows = sorted(table, key=lambda method: table[method]["score"])
    scores, low, high = ([table[method][name] for method in rows] for name in ("score", "low", "high"))
    figure = Figure(figsize=(6, 1.2 + 0.4 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.hlines(range(len(rows)), low, high, color="#1f6f8b", linewidth=2)
    axis.plot(scores, range(len(rows)), "o", color="#1f6f8b")
    axis.axvline(0, color="gray", linewidth=0.8, zorder=0)
    axis.set(xlabel="Bradley-Terry score (log-strength, mean 0), 95 % interval", ylim=(-0.6, len(rows) - 0.4))
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
