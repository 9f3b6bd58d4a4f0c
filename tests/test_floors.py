"""The house stands: imports go to lower floors, heavy libraries have one door each, ``import harmony`` is free."""

import ast
import functools
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "harmony"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
ONE_DOOR = ("fiftyone", "wandb", "gradio", "mitsuba")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@functools.cache
def floor(path: Path) -> int:
    """The number in the first word of the docstring, ``F3.``"""
    word = (ast.get_docstring(ast.parse(path.read_text())) or "?").split()[0]
    assert word[0] == "F" and word[1:-1].isdigit() and word[-1] == ".", f"{path}: the docstring begins with {word!r}"
    return int(word[1:-1])


def imported(path: Path) -> set[str]:
    """Full names of what a file imports anywhere, functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@functools.cache
def edges() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports."""
    modules = {module_name(path) for path in FILES}
    return {module_name(path): imported(path) & modules for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_to_lower_floors(path):
    """Siblings in one folder may share a floor, and so may the pure functions of F1; anything else has to lie lower."""
    floors = {module_name(other): floor(other) for other in FILES}
    here = module_name(path)
    folder = here.rpartition(".")[0]
    for name in edges()[here]:
        neighbours = floors[here] == 1 or (folder != "harmony" and name.rpartition(".")[0] == folder)
        assert floors[name] < floors[here] + neighbours, f"{here} (F{floors[here]}) imports {name} (F{floors[name]})"


def test_no_circles():
    graph, done = edges(), set()

    def visit(name, path):
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_heavy_libraries_have_one_door():
    doors = defaultdict(set)
    for path in FILES:
        for name in imported(path):
            doors[name.split(".")[0]].add(module_name(path))
    for library in ONE_DOOR:
        assert len(doors[library]) <= 1, f"{library} is imported in {sorted(doors[library])}"


def test_import_is_instant():
    code = "import sys, harmony; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy", "hydra", "fiftyone", "lightning"} & set(loaded.split())


def test_datasets_hold_no_python():
    """A module there would shadow the library of the same name."""
    assert not list((ROOT / "datasets").rglob("*.py"))
