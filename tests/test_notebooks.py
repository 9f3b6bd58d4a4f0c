"""The notebooks run top to bottom on the bundled data, and hold no outputs in the repository."""

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

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


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_it_runs(path, desk):
    """Guards the notebooks against the library moving on: no cell fails, the pictures are there."""
    book = nbformat.read(desk / path.name, as_version=4)
    environment = os.environ | {"PYTHONPATH": str(path.parents[1])}
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(desk)}}).execute(env=environment)
    shown = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 2
    assert not any(output.output_type == "error" for output in shown)
