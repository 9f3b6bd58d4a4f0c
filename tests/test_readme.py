"""The READMEs: every command in them is one that exists, links lead somewhere, and the first page stays short."""

import re
import shlex
from pathlib import Path

import pytest

from harmony import bench, edit, evaluate, export, fit, harmonize
from harmony.cli.compose import compose

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *sorted((ROOT / "datasets").glob("*/README.md"))]
READ = {
    "fit": fit.overrides,
    "harmonize": harmonize.overrides,
    "edit": edit.overrides,
    "evaluate": evaluate.overrides,
    "export": export.overrides,
    "bench": bench.words,
}


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(command, its words) of each indented line that runs harmony, continued lines joined, comments cut off."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    lines = re.findall(
        r"^ {4,}(?:[A-Z_]+=\S+ )*(?:torchrun [^\n]*? )?(?:python )?-m harmony\.(\w+)(.*)$", text, flags=re.M
    )
    return [(name, shlex.split(words, comments=True)) for name, words in lines]


LISTED = [(page, *command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(
    "page, name, words", LISTED, ids=lambda value: "" if isinstance(value, Path) else str(value)[:60]
)
def test_a_command_composes(page, name, words):
    """Guards what a reader types: no option, experiment or dataset that is not there."""
    compose(name, READ.get(name, list)(words))


def test_there_are_commands():
    assert len(LISTED) > 20 and {name for _, name, _ in LISTED} >= {"fit", "harmonize", "evaluate", "edit", "export"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_are_there(page):
    """Guards the names of files of the package, written from the project's root."""
    for file in re.findall(r"`(harmony/[\w/]+\.\w+)`", page.read_text()):
        assert (ROOT / file).exists(), file


def test_the_first_page_is_short():
    """Guards the reader's time: 130 lines at most, the first command for a photograph of one's own before line 50."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert next(n for n, line in enumerate(lines, 1) if "-m harmony.harmonize" in line) < 50
