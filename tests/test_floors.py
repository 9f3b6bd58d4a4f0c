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
ONE_DOOR = ("fiftyone", "wandb", "mitsuba", "gradio")
PLUGIN = "harmony.apps.plugin."  # the second door of FiftyOne, which loads this folder itself
FLOORS = (  # from below; what lies directly in the package, the commands, stands on top
    "core",
    "cli",
    "pixels",
    "metrics",
    "models",
    "data",
    "sampling",
    "methods",
    "evaluation",
    "training",
    "benchmarks",
    "apps",
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def floor(module: str) -> int:
    """The number of a module's folder from below; the commands, which lie in no folder, stand on top."""
    folders = module.split(".")[1:-1]
    return FLOORS.index(folders[0]) if folders else len(FLOORS)


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


def test_every_folder_is_a_floor():
    """Guards the plan: a new folder has a place in it."""
    folders = {path.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE}
    assert folders == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_to_lower_floors(path):
    """A folder imports the folders below it; commands import no command."""
    here = module_name(path)
    for name in edges()[here]:
        neighbors = here.split(".")[1:-1][:1] == name.split(".")[1:-1][:1] and floor(here) < len(FLOORS)
        assert floor(name) < floor(here) or neighbors, f"{here} imports {name}"


def test_hydra_has_one_door():
    """Commands are composed, checked and explained in one place; others take of Hydra only what builds objects."""
    allowed = {"hydra", "hydra.utils", "hydra.utils.instantiate", "hydra.utils.get_class"}
    for path in FILES:
        names = {name for name in imported(path) if name.split(".")[0] == "hydra"}
        assert module_name(path).startswith("harmony.cli.") or names <= allowed - {"hydra"}, path
        assert not (names and module_name(path).startswith("harmony.apps.")), path


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
            if not (name.split(".")[0] == "fiftyone" and module_name(path).startswith(PLUGIN)):
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
