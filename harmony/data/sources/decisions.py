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

from harmony.core.errors import UserError
from harmony.core.files import write_text
from harmony.core.foreign import read_csv, read_lines
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


class Table(NamedTuple):
    """The table as people wrote it, all rows, readable or not; ``columns``: the header in lower case."""

    delimiter: str
    columns: list[str]
    header: list[str]
    rows: list[list[str]]

    def find_key(self, row: list[str]) -> str:
        """The <split>/<id> of a row; empty where it has none."""
        return self.read_value(row, "sample").strip()

    def find_decision(self, row: list[str]) -> Decision | None:
        """The decision of a row; None for one that says neither keep nor reject, or not on which sample."""
        choice = self.read_value(row, "decision").strip().lower()
        is_readable = choice in (KEEP, REJECT) and self.find_key(row)
        return Decision(choice, self.read_value(row, "reason")) if is_readable else None

    def read_value(self, row: list[str], name: str) -> str:
        """The text of a row in a column; empty where the row is cut."""
        return "".join(row[(n := self.columns.index(name)) : n + 1])


def open_table(file: Path) -> Table:
    """Read the table; that of a file that is not there has no rows. UserError for a header without its columns."""
    delimiter = max(",;\t", key=read_lines(file)[0].count) if file.exists() else ","  # spreadsheets choose one
    header, *rows = (read_csv(file, delimiter) if file.exists() else []) or [list(COLUMNS)]
    columns = [name.strip().lower() for name in header]
    if not set(COLUMNS) <= set(columns):
        raise UserError(f"{file}: its first line must be {','.join(COLUMNS)}; mend it or remove the file")
    return Table(delimiter, columns, header, rows)


def read_decisions(file: Path) -> dict[str, Decision]:
    """Read {<split>/<id>: decision}; rows that say neither keep nor reject are named and left out."""
    table, decisions, wrong_rows = open_table(file), {}, []
    for number, row in enumerate(table.rows, start=2):
        if (decision := table.find_decision(row)) is not None:
            decisions[table.find_key(row)] = decision
        else:
            wrong_rows.append(f"row {number}")
    tell_names(f"{file}: rows without a sample and keep or reject", wrong_rows, " left out")
    return decisions


def change_decisions(file: Path, changes: Mapping[str, Decision | None]) -> dict[str, Decision]:
    """Add decisions to the file, or take back those that are None; returns all that stand there now.

    All other rows stay in the file, also those that cannot be read.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):  # two people may decide at once
        table = open_table(file)
        rows = [row for row in table.rows if table.find_key(row) not in changes]
        for key, decision in changes.items():
            if decision is not None:
                values = dict(zip(COLUMNS, (key, *decision), strict=True))
                rows.append([values.get(name, "") for name in table.columns])
        text = StringIO()
        csv.writer(text, delimiter=table.delimiter, lineterminator="\n").writerows([table.header, *rows])
        write_text(file, text.getvalue())
    return read_decisions(file)


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
