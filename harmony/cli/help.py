"""``--help`` for people: what a command does, its groups with their options, its settings with their comments."""

import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from harmony.cli.compose import why
from harmony.cli.explain import default_groups, experiments, group_options, parts_of

WIDTH = 100


def wrap(line: str) -> list[str]:
    """A line of help within ``WIDTH`` columns; a comment, or what an experiment is for, goes on below itself."""
    start = re.match(r".*?(?<!\S)# |  \w+  +| *", line)[0]
    indent = " " * (len(start) - 2) + "# " if start.endswith("# ") else " " * len(start)
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False) or [line]


def help_text(task: Callable, name: str, config_dir: Path) -> str:
    """What ``--help`` prints: what the command does, groups with their options, settings with their comments."""
    about = inspect.cleandoc(sys.modules[task.__module__].__doc__ or task.__doc__ or name)
    groups = default_groups(name, config_dir)
    lines = [*about.splitlines(), "", f"Usage: python -m harmony.{name} [KEY=VALUE ...] [GROUP=OPTION ...]", ""]
    if groups:
        lines.append("Groups (* = default)")
    for group, chosen in groups.items():
        if group == "experiment":  # they are listed below, each with its reason
            continue
        names = [f"{option}*" if option == chosen else option for option in group_options(group, name, config_dir)]
        lines.append(f"  {group:<12} {'  '.join(names)}")
    if "experiment" in groups:
        lines += ["", "Experiments"]
        lines += [f"  {option:<20} {why(path)}" for option, path in experiments(name, config_dir).items()]
    studies = [f"study/{option}" for option in group_options("study", name, config_dir)] if "study" in groups else []
    for file in (name, *parts_of(name, config_dir), *studies):
        text = (config_dir / f"{file}.yaml").read_text()
        settings = re.sub(r"(?m)^defaults:\n(?:[ \t-].*\n|\n)*", "", text).strip().splitlines()
        title = "Settings and their defaults" if file == name else settings.pop(0).lstrip("# ")
        title = f"{file.replace('/', '=')}: {title}" if file in studies else title
        lines += ["", title, *(f"  {line}" for line in settings)]
    lines.append("")
    lines += [
        "Flags",
        "  --cfg job [--resolve]   print the configuration and stop",
        "  -m, --multirun          one run for each combination: seed=1,2,3 (trainer.devices=1 only)",
        "  --config-dir FOLDER     a folder with further groups and options",
    ]
    return "\n".join(part.rstrip() for line in lines for part in wrap(line))
