"""What every evaluation leaves: figures, facts, a table, pictures, rows of its page."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harmony.evaluation.pages import PageRow


@dataclass(frozen=True)
class Report:
    """``figures``: flat names -> numbers; ``facts``: what they depend on; ``text``: the table in Markdown.

    ``pictures``: files; ``rows``: for the page, some of the pictures, of which there are ``facts["count"]``.
    """

    figures: dict[str, float] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    text: str = ""
    pictures: list[Path] = field(default_factory=list)
    rows: "Iterable[PageRow]" = ()
