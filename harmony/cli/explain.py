"""What is wrong with a configuration, in one line, with the nearest right name where there is one."""

import difflib
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harmony.cli.compose import CONFIGS, GROUPS, compose, list_bundled, load_yaml, one_line, options, places
from harmony.core.errors import UserError


def nearest(word: str, words: Iterable[str]) -> str:
    """``"; did you mean X?"``, or nothing where no word is near."""
    near = difflib.get_close_matches(word, sorted(words), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def key_paths(node: Any, prefix: str = "") -> Iterator[str]:
    """All dotted paths of a nested mapping."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from key_paths(value, f"{prefix}{key}.")


def parameters(target: str) -> set[str] | None:
    """Names that a ``_target_`` accepts as keywords; None when it accepts any."""
    try:
        signature = inspect.signature(get_object(target))
    except ValueError:  # a builtin without a signature
        return None
    except Exception as error:
        raise UserError(f"_target_: {target} cannot be imported: {one_line(error)}") from error
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
        return None
    return set(signature.parameters)


def unknown_keys(body: dict, base: dict, full: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Paths in ``body`` that nothing reads, each with the nearest right name.

    ``base`` is the configuration without ``body``, ``full`` the one with it. A key is read when ``base`` has it or
    when the ``_target_`` of its node takes it. An empty mapping in ``base`` is open: nothing is known of it.
    """
    for key, value in body.items():
        if key in base:
            if isinstance(value, dict) and isinstance(base[key], dict) and base[key]:
                yield from unknown_keys(value, base[key], full[key], f"{prefix}{key}.")
        elif key in ("_target_", "_partial_", "_convert_", "_recursive_", "_args_"):
            continue
        elif prefix and isinstance(value, dict) and "_target_" in value:  # one more callback, logger, ...
            yield from unknown_keys(value, {}, value, f"{prefix}{key}.")
        else:
            accepted = parameters(full["_target_"]) if full.get("_target_") else set()
            if accepted is not None and key not in accepted:
                yield f"{prefix}{key}", nearest(f"{prefix}{key}", (f"{prefix}{name}" for name in {*base, *accepted}))


def ancestry(experiment: str, files: Mapping[str, Path]) -> list[str]:
    """``experiment`` and the experiments that its defaults list starts from."""
    entries = load_yaml(files[experiment]).get("defaults", [])
    parents = [entry for entry in entries if isinstance(entry, str) and entry in files and entry != experiment]
    return [experiment, *(name for parent in parents for name in ancestry(parent, files))]


def check_experiment(name: str, choices: Mapping[str, str | None], config_dir: Path = CONFIGS) -> None:
    """Raise UserError for a key in the chosen experiment's file that the configuration ``name`` does not know.

    ``choices`` maps groups to options, with the key ``experiment`` among them: ``check_experiment("fit", {"experiment":
    "color"})``. Hydra itself adds such keys without a word.
    """
    files = options("experiment")
    overrides = [f"{group}={option}" for group, option in choices.items() if option is not None]
    base, full = (
        OmegaConf.to_container(compose(name, overrides, config_dir, strip_experiments=strip)) for strip in (True, False)
    )
    for experiment in ancestry(str(choices["experiment"]), files):
        body = OmegaConf.to_container(load_yaml(files[experiment]))
        body = {key: value for key, value in body.items() if key not in ("defaults", "hydra")}
        for key, hint in unknown_keys(body, base, full):
            raise UserError(f"{files[experiment]}: unknown key {key}{hint}")


def find_shadows(choices: Mapping[str, str | None]) -> list[str]:
    """A line for each file of the chosen experiment and dataset that stands in place of one of harmony's own."""
    lines = []
    for group in GROUPS:
        files, own_files, option = options(group), list_bundled(group), choices.get(group)
        names = ancestry(option, files) if group == "experiment" and option in files else [option]
        for name in {*names} & {*files} & {*own_files}:
            if files[name].read_bytes() != own_files[name].read_bytes():
                lines.append(f"{group}={name} is that of {files[name]}, not harmony's own")
    return lines


def groups_in(file: Path) -> dict[str, str | None]:
    """Groups in the defaults list of a configuration file, and the option that it gives to each."""
    entries = OmegaConf.to_container(load_yaml(file)).get("defaults", [])
    pairs = [next(iter(entry.items())) for entry in entries if isinstance(entry, dict)]
    return {re.sub(r"^(override |optional |/)+", "", key).split("@")[0]: option for key, option in pairs}


def default_groups(name: str, config_dir: Path) -> dict[str, str | None]:
    """Groups of a primary configuration and the option each starts with; not those that others choose."""
    groups = groups_in(config_dir / f"{name}.yaml").items()
    return {key: option for key, option in groups if "${" not in str(option) and not key.startswith("hydra/")}


def experiments(name: str, config_dir: Path) -> dict[str, Path]:
    """Name and file of the experiments of a command: those that set no group which the command does not have."""
    files, base = options("experiment"), {*default_groups(name, config_dir)}
    groups = {file: {group for n in ancestry(file, files) for group in groups_in(files[n])} for file in files}
    return {experiment: file for experiment, file in files.items() if groups[experiment] <= base}


def command_of(experiment: str, config_dir: Path) -> str | None:
    """The command that takes an experiment; None where there is none."""
    commands = [path.stem for path in sorted(config_dir.glob("*.yaml")) if "experiment" in groups_in(path)]
    return next((name for name in commands if experiment in experiments(name, config_dir)), None)


def parts_of(name: str, config_dir: Path) -> list[str]:
    """Files beside a primary configuration that it takes settings from."""
    entries = OmegaConf.to_container(load_yaml(config_dir / f"{name}.yaml")).get("defaults", [])
    return [entry for entry in entries if isinstance(entry, str) and entry != "_self_"]


def group_options(group: str, name: str, config_dir: Path) -> list[str]:
    """Options of a group that the command ``name`` may take."""
    if group == "experiment":
        return list(experiments(name, config_dir))
    if group in GROUPS:
        return list(options(group))
    return sorted(path.stem for path in (config_dir / group).glob("*.yaml"))


def explain_missing(error: MissingConfigException, name: str, config_dir: Path) -> str:
    """An option that no group has, in one line."""
    group, _, option = str(error.missing_cfg_file).strip("/").rpartition("/")
    names = group_options(group, name, config_dir)
    if not names:
        searched = f"; looked in {', '.join(map(str, places(group)))}" if group in GROUPS else ""
        return f"there is no {group or 'configuration'} called {option}{searched}"
    every = options(group) if group in GROUPS else names  # also those of other commands
    return f"unknown {group}={option}{nearest(option, every) or '.'} There are: {', '.join(names)}"


def explain_key(key: str, where: str, name: str, overrides: list[str], config_dir: Path) -> str:
    """A key that the configuration does not have, in one line."""
    others = [override for override in overrides if override.lstrip("+~").split("=")[0] != key]
    try:
        base = OmegaConf.to_container(compose(name, others, config_dir))
    except (HydraException, OmegaConfBaseException):  # a second mistake; it is reported when this one is mended
        base = OmegaConf.to_container(compose(name, (), config_dir))
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(OmegaConf.create(base), parent) if parent else None
    if isinstance(node, DictConfig) and node.get("_target_") and leaf in (parameters(node["_target_"]) or ()):
        return f"{key} has no value to override; add it with a plus sign: +{key}=..."
    return f"{where}unknown key {key}{nearest(key, {*key_paths(base), *default_groups(name, config_dir)})}"


def explain(error: Exception, name: str, overrides: list[str], config_dir: Path) -> str:
    """An error of composition in one line, with the nearest right name where there is one."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file not in (None, name):
        return explain_missing(error, name, config_dir)
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r} on the command line; it should look like key=value, quoted if need be"
    unknown = re.search(r"(?:In '([^']+)': )?Could not (?:override|delete)[^']*'([^']+)'", str(error))
    if isinstance(error, ConfigCompositionException) and unknown:
        place, key = unknown.groups()
        group, _, option = (place or "").partition("/")
        if group == "experiment" and (other := command_of(option, config_dir)) not in (None, name):
            return f"experiment={option} is one of harmony.{other}: python -m harmony.{other} experiment={option}"
        return explain_key(key, f"{place}: " if place and place != name else "", name, overrides, config_dir)
    return one_line(error)


def refuse_parallel_sweep(cfg: DictConfig) -> None:
    """A process that Lightning starts repeats the whole command, so it would start the whole sweep again."""
    devices, nodes = OmegaConf.select(cfg, "trainer.devices"), OmegaConf.select(cfg, "trainer.num_nodes")
    one = devices in (None, 1, "1") or (OmegaConf.is_list(devices) and len(devices) == 1)
    if not one or nodes not in (None, 1):
        raise UserError(
            f"--multirun does not work with trainer.devices={devices}: each further process would start the sweep"
            " again; set trainer.devices=1, or start one command a run"
        )


def missing_keys(node: dict, prefix: str = "") -> Iterator[str]:
    """Dotted paths of the values ``???``."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from missing_keys(value, f"{prefix}{key}.")
        elif value == "???":
            yield f"{prefix}{key}"


def refuse_missing(cfg: DictConfig) -> None:
    """Keys that have no default and were not given."""
    # unresolved: what refers to a missing key is not missing itself
    missing = sorted(missing_keys(OmegaConf.to_container(cfg, resolve=False)))
    if missing:
        raise UserError(f"{' and '.join(missing)} not given; add {' '.join(f'{key}=...' for key in missing)}")


def refuse_logger(cfg: DictConfig) -> None:
    """A logger that is not installed, before anything is done rather than when it is first asked for."""
    target = OmegaConf.select(cfg, "logger._target_") or ""
    if target.endswith("WandbLogger") and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed: pip install wandb, or logger=none (the run folder has everything too)")
