"""Answers of a user study: the files that hold them, who was chosen how often, and who chooses alike."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harmony.core.errors import UserError
from harmony.core.files import write_json
from harmony.core.foreign import read_json

SCHEMA = 1  # of the answers' files
Trial = tuple[str, frozenset[str]]  # a picture and the two methods between which was chosen


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

    @property
    def trial(self) -> Trial:
        return self.picture, frozenset((self.left, self.right))


@dataclass(frozen=True)
class Rater:
    """Who answered: a person, or in one of two orders the vision-language model ``model``."""

    name: str
    answers: Sequence[Answer]
    model: str | None = None


def answers_of(raters: Iterable[Rater]) -> list[Answer]:
    """The answers of all raters."""
    return [answer for rater in raters for answer in rater.answers]


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


def read_rater(file: Path, study: str, pictures: Sequence[str], codes: Mapping[str, str]) -> Rater:
    """The rater of a file that ``study`` has handed out. UserError for any other file, by its name."""
    record = read_json(file)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UserError(f"{file} holds no answers of a user study (schema {SCHEMA}); take it out of study.answers")
    if record.get("study") != study:
        raise UserError(
            f"{file} belongs to study {record.get('study')}, this is {study}: give the methods, pictures, names, "
            "question and limit that its page was made of"
        )
    entries, model = record.get("answers"), record.get("model")
    has_names = isinstance(record.get("rater"), str) and isinstance(model, str | None)
    if not has_names or not isinstance(entries, list) or not entries:
        raise UserError(f"{file} names no rater or holds no answers; take it out of study.answers")
    answers, trials = [], set()
    for n, entry in enumerate(entries):
        try:
            answer = read_answer(entry, pictures, codes)
            if answer.trial in trials:
                raise ValueError("repeats an earlier one")
        except ValueError as error:
            raise UserError(f"{file}: answer {n} {error}; ask the rater for the file again") from None
        answers.append(answer)
        trials.add(answer.trial)
    return Rater(record["rater"], answers, model)


def write_rater(file: Path, rater: Rater, study: str, codes: Mapping[str, str]) -> None:
    """Write the answers of a model as the page of ``study`` hands out those of people; ``read_rater`` reads them."""
    code = {method: code for code, method in codes.items()}
    sides = ("left", "right", "chosen")
    entries = [asdict(answer) | {side: code[getattr(answer, side)] for side in sides} for answer in rater.answers]
    write_json(file, {"schema": SCHEMA, "study": study, "rater": rater.name, "model": rater.model, "answers": entries})


def answer_files(places: str | Sequence[str]) -> list[Path]:
    """The files that ``study.answers`` names: a file, a folder of ``*.json``, or a list of both."""
    files = []
    for place in [places] if isinstance(places, str) else places:
        files_in = sorted(Path(place).glob("*.json")) if Path(place).is_dir() else [Path(place)]
        if not files_in:
            raise UserError(f"study.answers={place}: there are no .json files in it")
        files += files_in
    return files


# --- who chooses alike


class Share(NamedTuple):
    """The share of ``count`` trials, and its standard error."""

    share: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{self.share:.0%} ±{self.error:.1%} (n = {self.count})"


def count_share(hits: Sequence[bool]) -> Share | None:
    """How often a hit was one; None where there are no trials."""
    if not hits:
        return None
    share = sum(hits) / len(hits)
    return Share(share, (share * (1 - share) / len(hits)) ** 0.5, len(hits))


def group_choices(answers: Iterable[Answer]) -> dict[Trial, list[str]]:
    """The methods that were chosen in each trial, an answer each."""
    choices = defaultdict(list)
    for answer in answers:
        choices[answer.trial].append(answer.chosen)
    return choices


def find_majority(answers: Iterable[Answer]) -> dict[Trial, str]:
    """What more than half of the answers to a trial choose, for trials where there is such a method."""
    choices = group_choices(answers)
    return {trial: method for trial, own in choices.items() for method in set(own) if 2 * own.count(method) > len(own)}


def find_firm(answers: Iterable[Answer]) -> dict[Trial, str]:
    """What a model chose in both orders, for trials in which it was the same."""
    return {trial: own[0] for trial, own in group_choices(answers).items() if len(own) > 1 and len(set(own)) == 1}


def compare_orders(answers: Iterable[Answer]) -> Share | None:
    """Share of the trials asked in both orders in which a model chose the same."""
    return count_share([len(set(own)) == 1 for own in group_choices(answers).values() if len(own) > 1])


def compare_with_people(answers: Iterable[Answer], people: Sequence[Rater]) -> Share | None:
    """Share of the trials with a majority of people in which a model, firm in its choice, chose as they did."""
    majority = find_majority(answers_of(people))
    firm = find_firm(answers)
    return count_share([firm[trial] == majority[trial] for trial in firm.keys() & majority.keys()])


def compare_people(people: Sequence[Rater]) -> Share | None:
    """Share of the answers of single people that are those of the majority of the others."""
    hits = []
    for rater in people:
        majority = find_majority(answers_of(other for other in people if other is not rater))
        hits += [majority[answer.trial] == answer.chosen for answer in rater.answers if answer.trial in majority]
    return count_share(hits)
