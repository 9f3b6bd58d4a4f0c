"""Writes a class of harmony, with everything of harmony that it needs, into one file that runs without harmony."""

import ast
import builtins
import importlib.util
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

LINE_LENGTH = 120
NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs)  # they name something
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True)
class Source:
    """A module of ours: its ``lines``, its ``definitions`` by name, and what it imports, name -> (module, name there).

    An import of a whole module has no name there.
    """

    lines: list[str]
    definitions: dict[str, ast.stmt]
    imports: dict[str, tuple[str, str | None]]


@cache
def read_source(module: str) -> Source:
    """Read a module without running it."""
    text = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    source = Source(text.splitlines(), {}, {})
    for node in ast.parse(text).body:
        match node:
            case ast.Import():
                source.imports.update({alias.asname or alias.name: (alias.name, None) for alias in node.names})
            case ast.ImportFrom():
                source.imports.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
            case ast.FunctionDef() | ast.ClassDef():
                source.definitions[node.name] = node
            case ast.AnnAssign(target=ast.Name(id=name)):
                source.definitions[name] = node
            case ast.Assign():
                names = [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
                source.definitions.update(dict.fromkeys(names, node))
    return source


def find_names(node: ast.AST) -> set[str]:
    """The names that a piece of code reads from its module."""
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Load) else set()
    names = set().union(*map(find_names, ast.iter_child_nodes(node)))
    if not isinstance(node, FUNCTIONS):
        return names
    inside = [n for part in (node.body if isinstance(node.body, list) else [node.body]) for n in ast.walk(part)]
    local = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    local |= {n.arg for n in ast.walk(node.args) if isinstance(n, ast.arg)}
    local |= {n.name for n in inside if isinstance(n, NAMED)}
    imports = [alias for n in inside if isinstance(n, ast.Import | ast.ImportFrom) for alias in n.names]
    local |= {(alias.asname or alias.name).partition(".")[0] for alias in imports}
    outside = [node.args, *getattr(node, "decorator_list", ()), *filter(None, [getattr(node, "returns", None)])]
    return (names - local) | set().union(*map(find_names, outside))


@dataclass
class Bundle:
    """The code that has been collected: ``pieces`` in the order in which they can run, and foreign ``imports``.

    ``origins``: name -> (module, name there) of all that the file defines.
    """

    pieces: dict[tuple[str, int], str] = field(default_factory=dict)
    origins: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)

    def add(self, module: str, name: str) -> None:
        """Add what ``name`` means in a module of ours, and before it all that it reads."""
        source = read_source(module)
        if name in source.imports:
            origin, original = source.imports[name]
            if not origin.startswith("harmony."):
                self.claim(name, (origin, original))
                self.imports[name] = (origin, original)
            elif original == name:
                self.add(origin, name)
            else:
                raise ValueError(f"{module} imports {origin} under the name {name}")
        elif name in source.definitions:
            node = source.definitions[name]
            if self.claim(name, (module, name)) and (module, node.lineno) not in self.pieces:
                for other in sorted(find_names(node) - {name}):
                    self.add(module, other)
                start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
                self.pieces[module, node.lineno] = "\n".join(source.lines[start - 1 : node.end_lineno])
        elif not hasattr(builtins, name) and name != "__file__":
            raise ValueError(f"{module} reads {name}, which it neither imports nor defines in a plain statement")

    def claim(self, name: str, origin: tuple[str, str | None]) -> bool:
        """Whether ``name`` is new. ValueError where it means something else in another module."""
        before = self.origins.setdefault(name, origin)
        if before != origin:
            raise ValueError(f"{name} means {'.'.join(filter(None, before))} and {'.'.join(filter(None, origin))}")
        return before is origin

    def format_imports(self) -> str:
        """The imports, one statement a module."""
        groups, lines = defaultdict(list), []
        for name, (module, original) in sorted(self.imports.items()):
            words = name if name == (original or module) else f"{original or module} as {name}"
            if original:
                groups[module].append(words)
            else:
                lines.append(f"import {words}")
        for module, names in sorted(groups.items()):
            line = f"from {module} import {', '.join(names)}"
            wrapped = "".join([f"from {module} import (\n", *(f"    {name},\n" for name in names), ")"])
            lines.append(line if len(line) <= LINE_LENGTH else wrapped)
        return "\n".join(lines)


def bundle(module: str, name: str, title: str) -> str:
    """The text of a file that defines ``name`` of a module of ours and imports nothing of ours."""
    collected = Bundle()
    collected.add(module, name)
    return "\n\n\n".join([f'"""{title}"""', collected.format_imports(), *collected.pieces.values()]) + "\n"
