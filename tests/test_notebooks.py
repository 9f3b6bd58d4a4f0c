"""The notebooks run top to bottom on the bundled data, and hold no outputs in the repository."""

import json
import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from harmony.models.controlnet import read_hint
from harmony.models.shipped import ASSETS

BOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with the notebooks, which keep their prepared data in ``work`` beside it."""
    folder = tmp_path_factory.mktemp("desk") / "notebooks"
    shutil.copytree(BOOKS[0].parent, folder)
    return folder


def test_they_are_all_here():
    assert [path.stem for path in BOOKS] == ["01_browse", "02_hints", "03_results", "04_your_photograph"]


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs(path):
    """Guards reviews and the size of the history: what a notebook showed belongs to whoever ran it."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)


def execute(book, folder):
    environment = os.environ | {"PYTHONPATH": str(BOOKS[0].parents[1])}
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}}).execute(env=environment)


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_it_runs(path, desk):
    """Guards the notebooks against the library moving on: no cell fails, the pictures are there."""
    book = nbformat.read(desk / path.name, as_version=4)
    execute(book, desk)
    shown = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 2
    assert not any(output.output_type == "error" for output in shown)


@pytest.mark.slow
def test_04_runs_with_your_own(desk):
    """Guards the promise that one cell is to change: names with spaces and another ControlNet reach all others."""
    files = {"background": "rocket.jpg", "foreground": "astronaut.webp"}
    for name in files.values():
        shutil.copy(ASSETS / "example" / name, desk / f"my, own {name}")
    book = nbformat.read(desk / BOOKS[3].name, as_version=4)
    words = [f"{option}=my, own {name}" for option, name in files.items()]
    words += ["box=20,100,328,427", "prompt=a man, far away", "controlnet=color", "detail=none", "steps=2", "seed=3"]
    book.cells[1].source = f"OVERRIDES = {words!r}"
    execute(book, desk)
    facts = json.loads((desk.parent / "work" / "mine" / "facts.json").read_text())
    assert (facts["prompt"], facts["seed"], facts["options"]["background"]) == ("a man, far away", 3, words[0][11:])
    assert read_hint(desk.parent / "work" / "pipeline") == read_hint("color") != read_hint("color_relight")
