"""``--help`` for people: what a command does, its groups with their options, its settings with their comments."""

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

from harmony.cli.compose import options, why
from harmony.cli.explain import default_groups, group_options, parts_of


def help_text(task: Callable, name: str, config_dir: Path) -> str:
    """What ``--help`` prints: what the command does, groups with their options, settings with their comments."""
    about = inspect.cleandoc(sys.modules[task.__module__].__doc__ or task.__doc__ or name)
    groups = default_groups(name, config_dir)
    lines = [about, "", f"Usage: python -m harmony.{name} [KEY=VALUE ...] [GROUP=OPTION ...]", ""]
    if groups:
        lines.append("Groups (* = default)")
    for group, chosen in groups.items():
        names = [f"{option}*" if option == chosen else option for option in group_options(group, config_dir)]
        lines.append(f"  {group:<12} {'  '.join(names)}")
    if "experiment" in groups:
        lines += ["", "Experiments"]
        lines += [f"  {option:<20} {why(path)}" for option, path in options("experiment").items()]
    for file in (name, *parts_of(name, config_dir)):
        text = (config_dir / f"{file}.yaml").read_text()
        settings = re.sub(r"(?m)^defaults:\n(?:[ \t-].*\n|\n)*", "", text).strip().splitlines()
        title = "Settings and their defaults" if file == name else settings.pop(0).lstrip("# ")
        lines += ["", title, *(f"  {line}" for line in settings)]
    lines.append("")
    lines += [
        "Flags",
        "  --cfg job [--resolve]   print the configuration and stop",
        "  -m, --multirun          one run for each combination: seed=1,2,3 (trainer.devices=1 only)",
        "  --config-dir FOLDER     a folder with further groups and options",
    ]
    return "\n".join(line.rstrip() for line in lines)
