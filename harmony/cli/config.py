"""Hydra for every entry point: experiments and datasets, unknown keys, errors in one line, run folders.

``@entry("fit")`` turns ``main(cfg)`` into a command that composes ``configs/fit.yaml``. Experiments are files beside
the package, not below it, and Hydra takes group names from folders; so they are registered by hand, and so are the
recipes of ``datasets/``. Three folders are searched and the first that has a name wins: the environment variable, the
current folder, the folder that holds the package.
"""

import difflib
import errno
import functools
import importlib.metadata
import inspect
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from harmony.core.errors import UserError
from harmony.core.files import write_text
from harmony.core.signals import Interrupt, obey

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = PACKAGE / "configs"
# group: (environment variable, folder, files, the name of one, package of its keys)
GROUPS: dict[str, tuple[str, str, str, Callable[[Path], str], str]] = {
    "experiment": ("HARMONY_EXPERIMENTS", "experiments", "*.yaml", lambda path: path.stem, "_global_"),
    "dataset": ("HARMONY_DATASETS", "datasets", "*/recipe.yaml", lambda path: path.parent.name, "dataset"),
}
# Hydra must not change the folder, write its own files or touch logging: the run folder is ours.
HYDRA_SETTINGS = {
    "hydra.run.dir": ".",
    "hydra.output_subdir": "null",
    "hydra.sweep.dir": "${oc.select:paths.runs,runs}/.multirun",
    "hydra.sweep.subdir": ".",
    "hydra/job_logging": "none",
}
LIBRARIES = ("torch", "torchvision", "lightning", "diffusers", "transformers", "hydra-core", "numpy", "polars")
INTERRUPTED = "interrupted; the same command resumes"
WAIT_SECONDS = 60  # how long a rank that was started from outside waits for rank 0 to make the run folder


# Experiments and datasets -------------------------------------------------------------------------------------------


def places(group: str) -> list[Path]:
    """Folders in which the files of ``group`` (``experiment`` or ``dataset``) are looked for, first wins."""
    variable, folder = GROUPS[group][:2]
    given = [Path(os.environ[variable])] if os.environ.get(variable) else []
    return [place.resolve() for place in (*given, Path(folder), PACKAGE.parent / folder)]


def options(group: str) -> dict[str, Path]:
    """Name and file of each option of ``group``, sorted by name."""
    _, _, pattern, name_of, _ = GROUPS[group]
    found = {name_of(path): path for place in reversed(places(group)) for path in place.glob(pattern)}
    return dict(sorted(found.items()))


def why(path: Path) -> str:
    """First comment line of a YAML file: what it is for."""
    lines = (line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next((line for line in lines if line and not line.startswith("@package")), "")


def load_yaml(path: Path) -> DictConfig:
    """A YAML file that holds a mapping. Raises UserError when it does not."""
    try:
        node = OmegaConf.load(path)
    except YAMLError as error:
        raise UserError(f"{path} is no valid YAML: {one_line(error)}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{path} must hold a mapping of keys to values")
    return node


def register(strip_experiments: bool = False) -> None:
    """Put experiments and recipes into Hydra's ConfigStore; stripped experiments keep their defaults list only."""
    store = ConfigStore.instance()
    for group, (*_, package) in GROUPS.items():
        store.repo.pop(group, None)  # what another current folder had to offer
        for name, path in options(group).items():
            node = load_yaml(path)
            if strip_experiments and group == "experiment":
                node = OmegaConf.create({"defaults": node.get("defaults", ["_self_"])})
            store.store(group=group, name=name, node=node, package=package)


def compose(
    name: str, overrides: Iterable[str] = (), config_dir: Path = CONFIGS, strip_experiments: bool = False
) -> DictConfig:
    """The configuration that ``python -m harmony.<name> <overrides>`` would see. Raises Hydra's own errors."""
    register(strip_experiments)
    running = GlobalHydra.instance().hydra  # set inside a command, where Hydra would refuse a second composition
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(Path(config_dir).resolve()), version_base="1.3"):
            return hydra.compose(name, overrides=list(overrides))
    finally:
        GlobalHydra.instance().hydra = running


# Unknown keys -------------------------------------------------------------------------------------------------------


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


def unknown_keys(body: dict, known: dict, full: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Paths in ``body`` that nothing reads, each with the nearest right name.

    ``known`` is the configuration without ``body``, ``full`` the one with it. A key is read when ``known`` has it or
    when the ``_target_`` of its node takes it. An empty mapping in ``known`` is open: nothing is known of it.
    """
    for key, value in body.items():
        if key in known:
            if isinstance(value, dict) and isinstance(known[key], dict) and known[key]:
                yield from unknown_keys(value, known[key], full[key], f"{prefix}{key}.")
        elif key in ("_target_", "_partial_", "_convert_", "_recursive_", "_args_"):
            continue
        elif prefix and isinstance(value, dict) and "_target_" in value:  # one more callback, logger, ...
            yield from unknown_keys(value, {}, value, f"{prefix}{key}.")
        else:
            accepted = parameters(full["_target_"]) if full.get("_target_") else set()
            if accepted is not None and key not in accepted:
                yield f"{prefix}{key}", nearest(f"{prefix}{key}", (f"{prefix}{name}" for name in {*known, *accepted}))


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
    known, full = (
        OmegaConf.to_container(compose(name, overrides, config_dir, strip_experiments=strip)) for strip in (True, False)
    )
    for experiment in ancestry(str(choices["experiment"]), files):
        body = OmegaConf.to_container(load_yaml(files[experiment]))
        body = {key: value for key, value in body.items() if key not in ("defaults", "hydra")}
        for key, hint in unknown_keys(body, known, full):
            raise UserError(f"{files[experiment]}: unknown key {key}{hint}")


# Errors of composition ----------------------------------------------------------------------------------------------


def one_line(error: object) -> str:
    """The text of an error without its line breaks."""
    return " ".join(str(error).split())


def default_groups(name: str, config_dir: Path) -> dict[str, str | None]:
    """Groups in the defaults list of a primary configuration and the option each starts with; not those that others
    choose.
    """
    entries = OmegaConf.to_container(load_yaml(config_dir / f"{name}.yaml")).get("defaults", [])
    pairs = [next(iter(entry.items())) for entry in entries if isinstance(entry, dict)]
    pairs = [(key, option) for key, option in pairs if "${" not in str(option)]
    cleaned = {re.sub(r"^(override |optional |/)+", "", key).split("@")[0]: option for key, option in pairs}
    return {group: option for group, option in cleaned.items() if not group.startswith("hydra/")}


def group_options(group: str, config_dir: Path) -> list[str]:
    """Names that a group may take."""
    if group in GROUPS:
        return list(options(group))
    return sorted(path.stem for path in (config_dir / group).glob("*.yaml"))


def explain_missing(error: MissingConfigException, config_dir: Path) -> str:
    """An option that no group has, in one line."""
    group, _, option = str(error.missing_cfg_file).strip("/").rpartition("/")
    names = group_options(group, config_dir)
    if not names:
        searched = f"; looked in {', '.join(map(str, places(group)))}" if group in GROUPS else ""
        return f"there is no {group or 'configuration'} called {option}{searched}"
    return f"unknown {group}={option}{nearest(option, names)} There are: {', '.join(names)}"


def explain_key(key: str, where: str, name: str, overrides: list[str], config_dir: Path) -> str:
    """A key that the configuration does not have, in one line."""
    others = [override for override in overrides if override.lstrip("+~").split("=")[0] != key]
    try:
        known = OmegaConf.to_container(compose(name, others, config_dir))
    except (HydraException, OmegaConfBaseException):  # a second mistake; it is reported when this one is mended
        known = OmegaConf.to_container(compose(name, (), config_dir))
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(OmegaConf.create(known), parent) if parent else None
    if isinstance(node, DictConfig) and node.get("_target_") and leaf in (parameters(node["_target_"]) or ()):
        return f"{key} has no value to override; add it with a plus sign: +{key}=..."
    return f"{where}unknown key {key}{nearest(key, {*key_paths(known), *default_groups(name, config_dir)})}"


def explain(error: Exception, name: str, overrides: list[str], config_dir: Path) -> str:
    """An error of composition in one line, with the nearest right name where there is one."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file not in (None, name):
        return explain_missing(error, config_dir)
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r} on the command line; it should look like key=value, quoted if need be"
    unknown = re.search(r"(?:In '([^']+)': )?Could not (?:override|delete)[^']*'([^']+)'", str(error))
    if isinstance(error, ConfigCompositionException) and unknown:
        place, key = unknown.groups()
        return explain_key(key, f"{place}: " if place and place != name else "", name, overrides, config_dir)
    return one_line(error)


# Entry points -------------------------------------------------------------------------------------------------------


class _Leave(BaseException):
    """Carries an exception of the task past Hydra, which would print its own message first."""


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
    settings = re.sub(r"(?m)^defaults:\n(?:[ \t-].*\n|\n)*", "", (config_dir / f"{name}.yaml").read_text())
    lines += ["", "Settings and their defaults", *(f"  {line}" for line in settings.strip().splitlines()), ""]
    lines += [
        "Flags",
        "  --cfg job [--resolve]   print the configuration and stop",
        "  -m, --multirun          one run for each combination: seed=1,2,3 (trainer.devices=1 only)",
        "  --config-dir FOLDER     a folder with further groups and options",
    ]
    return "\n".join(line.rstrip() for line in lines)


def literal(override: str, keys: Iterable[str]) -> str:
    """``key=value`` with the value of a text key quoted, so that commas, brackets and spaces in it mean themselves."""
    key, _, value = override.partition("=")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if key.lstrip("+") not in keys or value == "null" or quoted:
        return override
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), value)
    return f"{key}='{escaped}'"


def run(
    task: Callable[[DictConfig], None],
    name: str,
    config_dir: Path,
    read: Callable[[list[str]], list[str]] = list,
    program: bool = False,
) -> int:
    """Compose the configuration from the command line and call ``task``; the exit code (0, 2, 130 or 143).

    ``program``: the process ends with the command (see ``obey``).
    """
    parser = get_args_parser()
    args = parser.parse_args()
    given = read(args.overrides)
    keys = {override.lstrip("+~").split("=")[0] for override in given}
    args.overrides = [f"{key}={value}" for key, value in HYDRA_SETTINGS.items() if key not in keys] + given
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints errors itself and leaves with code 1

    @functools.wraps(task)
    def job(cfg: DictConfig) -> None:
        try:
            settings = HydraConfig.get()
            if settings.mode is RunMode.MULTIRUN:
                refuse_parallel_sweep(cfg)
            choices = {key: option for key, option in settings.runtime.choices.items() if not key.startswith("hydra/")}
            if choices.get("experiment"):
                check_experiment(name, choices, config_dir)
            refuse_missing(cfg)
            task(cfg)
        except Exception as error:
            raise _Leave from error

    failure: BaseException | None = None
    try:
        with obey(INTERRUPTED if rank() == 0 else "", program):
            if args.help:
                print(help_text(task, name, config_dir))
            else:
                register()
                hydra.version.setbase("1.3")
                _run_hydra(args, parser, job, str(config_dir), name)
    except _Leave as leave:
        failure = leave.__cause__
    except (HydraException, OmegaConfBaseException) as error:
        failure = UserError(explain(error, name, given, config_dir))
    except (UserError, KeyboardInterrupt) as error:
        failure = error
    return report(failure)


def report(error: BaseException | None) -> int:
    """Exit code; what a user can mend or wanted is said in one line, what is a bug of ours is raised again."""
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        if rank() == 0:
            print(INTERRUPTED, file=sys.stderr)
        return error.code if isinstance(error, Interrupt) else 130
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, (UserError, OSError)):
        error = error.__cause__  # raised by what a _target_ names
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        error = UserError(f"disk full ({error.filename or os.getcwd()}); free some space, the same command goes on")
    if not isinstance(error, UserError):
        raise error
    print(f"harmony: error: {one_line(error)}", file=sys.stderr)
    return 2


def entry(
    name: str, config_dir: str | Path = CONFIGS, read: Callable[[list[str]], list[str]] = list
) -> Callable[[Callable[[DictConfig], None]], Callable]:
    """Decorator: ``main(cfg)`` becomes a command over ``<config_dir>/<name>.yaml``; called with a cfg it just runs.

    ``read`` turns the words of the command line into overrides, where a command takes words that Hydra does not.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable:
        @functools.wraps(task)
        def main(cfg: DictConfig | None = None) -> None:
            if cfg is not None:
                return task(cfg)
            program = sys._getframe(1).f_globals.get("__name__") == "__main__"
            code = run(task, name, Path(config_dir).resolve(), read, program)
            if code:
                sys.exit(code)

        return main

    return decorate


# Run folders --------------------------------------------------------------------------------------------------------


def rank() -> int:
    """Rank of this process among those that train together, before any process group exists."""
    return int(next((os.environ[k] for k in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if os.environ.get(k)), 0))


def world() -> int:
    """How many processes torchrun or srun started."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def device() -> str:
    """The GPU of this process where there is one."""
    import torch

    local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    return f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def identity(cfg: DictConfig) -> str:
    """The resolved configuration as YAML, without what differs between two goes of one run."""
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.paths.run = None
        cfg.pop("resume", None)
    return OmegaConf.to_yaml(cfg, resolve=True, sort_keys=True)


def unfinished(folder: Path, text: str) -> Path | None:
    """The newest run in ``folder`` of the configuration ``text`` that has no final ``metrics.json``."""
    runs = (path.parent for path in folder.glob("*/config.yaml") if path.read_text() == text)
    return max((run for run in runs if not (run / "metrics.json").exists()), default=None)


def new_folder(parent: Path) -> Path:
    """``parent/<timestamp>``; runs that begin in the same second get a number."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for name in (stamp, *(f"{stamp}_{i:02d}" for i in range(1, 100))):
        try:
            (parent / name).mkdir(parents=True)
            return parent / name
        except FileExistsError:
            continue
    raise UserError(f"{parent} holds 100 runs of this very second; wait and start again")


def run_folder(cfg: DictConfig) -> Path:
    """The folder of this run, ``<paths.runs>/<name>/<timestamp>``, absolute; also set as ``cfg.paths.run``.

    With ``resume: true`` the newest unfinished run of the same configuration goes on, with ``false`` a new one begins,
    with a path that folder is used. Rank 0 decides and writes ``config.yaml``; processes that it starts read
    HARMONY_RUN_DIR, processes started from outside (torchrun, SLURM) wait for the folder of their configuration.
    """
    text, resume = identity(cfg), cfg.get("resume", True)
    parent = Path(cfg.paths.runs).resolve() / str(cfg.name or "unnamed")
    if rank() > 0:
        folder = follow_rank_zero(parent, text, resume)
    elif isinstance(resume, str):
        folder = Path(resume).resolve()
        if not folder.is_dir():
            raise UserError(f"resume={resume}: there is no such run folder")
    else:
        folder = (unfinished(parent, text) if resume else None) or new_folder(parent)
    if rank() == 0:
        write_text(folder / "config.yaml", text)
        os.environ["HARMONY_RUN_DIR"] = str(folder)
    with open_dict(cfg):
        cfg.paths.run = str(folder)
    return folder


def follow_rank_zero(parent: Path, text: str, resume: bool | str) -> Path:
    """The run folder that rank 0 chose."""
    if os.environ.get("HARMONY_RUN_DIR"):
        return Path(os.environ["HARMONY_RUN_DIR"])
    if isinstance(resume, str):
        return Path(resume).resolve()
    if not resume:
        raise UserError("resume=false with processes started from outside needs the same HARMONY_RUN_DIR in each")
    for _ in range(WAIT_SECONDS * 10):
        folder = unfinished(parent, text)
        if folder:
            return folder
        time.sleep(0.1)
    raise UserError(f"rank {rank()} waited {WAIT_SECONDS} s for rank 0 to make a run folder in {parent}; is it shared?")


def make_folder(path: str | Path) -> Path:
    """The folder ``path``, absolute, made if need be. Raises UserError where it cannot be."""
    folder = Path(path).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}): choose another folder") from None
    return folder


# Provenance ---------------------------------------------------------------------------------------------------------


def version(distribution: str) -> str | None:
    """Installed version of a distribution, None when it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(root: Path = PACKAGE.parent) -> dict[str, Any]:
    """``commit`` and ``dirty`` of the checkout that the package lies in; nothing when it is installed elsewhere."""
    if not (root / ".git").exists():
        return {}
    try:
        ask = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, check=True)
        commit = ask(["git", "rev-parse", "HEAD"]).stdout.strip()
        return {"commit": commit, "dirty": bool(ask(["git", "status", "--porcelain"]).stdout.strip())}
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return {}


def device_name() -> str:
    """The accelerator that PyTorch sees, else the CPU's architecture and the number of threads."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"cpu {platform.machine()}, {torch.get_num_threads()} threads"


def provenance(cfg: DictConfig, **extra: Any) -> dict[str, Any]:
    """What a run depended on, for ``provenance.json``; ``extra`` adds kit hash, manifest hash, wall time."""
    return {
        "name": cfg.get("name"),
        "command": sys.argv,
        "seed": cfg.get("seed"),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(),
        "versions": {"harmony": version("harmony-diffusion"), **{name: version(name) for name in LIBRARIES}},
        "git": git_state(),
        **extra,
    }
