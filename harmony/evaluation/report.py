"""What every evaluation leaves: figures, facts, a table, pictures, rows of its page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harmony.evaluation.pages import PageRow


@dataclass(frozen=True)
class Report:
    """``figures``: flat names -> numbers; ``facts``: what they depend on; ``text``: the table in Markdown.

    ``pictures``: files; ``rows``: for the page, some of the pictures, of which there are ``facts["count"]``.
    ``samples``: of each picture, by its id, the ``caption`` and METHOD/METRIC -> figure.
    """

    figures: dict[str, float] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    text: str = ""
    pictures: list[Path] = field(default_factory=list)
    rows: "Sequence[PageRow]" = ()
    samples: dict[str, dict[str, float | str]] = field(default_factory=dict)
