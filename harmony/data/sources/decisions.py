"""Decisions by people on single photographs, which come before the rules of a recipe.

They stand in a plain table beside the work folder of a dataset, ``work/<name>.decisions.csv``, so that they outlive it.
"""

import csv
from collections.abc import Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import polars as pl
from filelock import FileLock

from harmony.core.files import write_text
from harmony.core.foreign import read_table
from harmony.core.progress import tell
from harmony.data.sources.files import tell_names
from harmony.data.sources.selection import BY_HAND, KEPT, RULE_REASONS, Selection, check_files, reject

KEEP, REJECT = "keep", "reject"
COLUMNS = ("sample", "decision", "reason")


class Decision(NamedTuple):
    """What a person decided on a photograph: ``choice`` is ``keep`` or ``reject``; ``reason`` in their own words."""

    choice: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.choice}: {self.reason}" if self.reason else self.choice


def decisions_file(folder: Path) -> Path:
    """The file of the decisions on the dataset that is prepared in ``folder``."""
    return folder.with_name(f"{folder.name}.decisions.csv")


def read_decisions(file: Path) -> dict[str, Decision]:
    """Read {<split>/<id>: decision}; rows that say neither keep nor reject are named and left out."""
    if not file.is_file():
        return {}
    decisions, wrong_rows = {}, []
    for number, row in enumerate(read_table(file), start=2):
        choice = row.get("decision", "").strip().lower()
        if choice in (KEEP, REJECT) and row.get("sample"):
            decisions[row["sample"].strip()] = Decision(choice, row.get("reason", ""))
        else:
            wrong_rows.append(f"row {number}")
    tell_names(f"{file}: rows without a sample and keep or reject", wrong_rows, " left out")
    return decisions


def change_decisions(file: Path, changes: Mapping[str, Decision | None]) -> dict[str, Decision]:
    """Add decisions to the file, or take back those that are None; returns all that stand there now."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):  # two people may decide at once
        decisions = {key: d for key, d in (read_decisions(file) | dict(changes)).items() if d is not None}
        text = StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows([key, *decision] for key, decision in sorted(decisions.items()))
        write_text(file, text.getvalue())
    return decisions


def apply_decisions(selection: Selection, decisions: Mapping[str, Decision]) -> Selection:
    """The selection with the photographs that are kept or rejected by hand; a line counts them and names the rest.

    A hand overrides rules alone: what is damaged, or has no instance with one mask, cannot be kept.
    """
    if not decisions:
        return selection
    table = reject(selection.table, choose_reasons(selection.table, decisions))
    table = check_files(table, selection.root)
    reasons = dict(list_reasons(table))
    counts = {choice: 0 for choice in (KEEP, REJECT)}
    ignored_keys = []
    for key, decision in sorted(decisions.items()):
        if reasons.get(key) == (KEPT if decision.choice == KEEP else BY_HAND):
            counts[decision.choice] += 1
        else:
            ignored_keys.append(key)
    tell(f"by hand: {counts[KEEP]} kept, {counts[REJECT]} rejected")
    tell_names("by hand: no such photographs, or none that can be kept", ignored_keys)
    return replace(selection, table=table)


def choose_reasons(table: pl.DataFrame, decisions: Mapping[str, Decision]) -> dict[str, str]:
    """{<split>/<id>: ``kept`` or ``by hand``} of the rows that a hand may decide on."""
    usable = table.filter(pl.col("reason").is_in([KEPT, *RULE_REASONS])).drop_nulls(["mask", "x0"])
    choices = {key: decisions[key].choice for key, _ in list_reasons(usable) if key in decisions}
    return {key: KEPT if choice == KEEP else BY_HAND for key, choice in choices.items()}


def list_reasons(table: pl.DataFrame) -> list[tuple[str, str]]:
    """(<split>/<id>, reason) of each row."""
    return table.select(pl.concat_str("split", "id", separator="/"), "reason").rows()


def list_kept(decisions: Mapping[str, Decision]) -> set[str]:
    """The keys of the photographs that are kept by hand."""
    return {key for key, decision in decisions.items() if decision.choice == KEEP}
