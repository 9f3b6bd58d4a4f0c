"""What every evaluation leaves: figures, facts, a table, pictures."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """``figures``: flat names -> numbers; ``facts``: what they depend on; ``text``: the table in Markdown."""

    figures: dict[str, float] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    text: str = ""
    pictures: list[Path] = field(default_factory=list)
