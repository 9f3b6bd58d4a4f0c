"""Commands: ``@entry("fit")`` turns ``main(cfg)`` into a command over ``configs/fit.yaml``; user errors in one line."""

import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import hydra
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    HydraException,
    InstantiationException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harmony.cli.compose import CONFIGS, compose, one_line, register
from harmony.cli.explain import (
    check_experiment,
    default_groups,
    explain,
    find_shadows,
    group_options,
    refuse_logger,
    refuse_missing,
    refuse_parallel_sweep,
)
from harmony.cli.help import help_text
from harmony.cli.logger import check_wandb
from harmony.cli.run_folder import made, rank, remove_made
from harmony.cli.values import check_groups, check_values, flatten
from harmony.core.errors import UserError
from harmony.core.quiet import quiet_libraries
from harmony.core.signals import Interrupt, obey

# Hydra must not change the folder, write its own files or touch logging: the run folder is ours.
HYDRA_SETTINGS = {
    "hydra.run.dir": ".",
    "hydra.output_subdir": "null",
    "hydra.sweep.dir": "${oc.select:paths.runs,runs}/.multirun",
    "hydra.sweep.subdir": ".",
    "hydra/job_logging": "none",
}
NAMES = ("dataset.select.image_ids", "dataset.select.classes", "dataset.select.sources")
INTERRUPTED = "interrupted; the same command resumes"


class _Leave(BaseException):
    """Carries an exception of the task past Hydra, which would print its own message first."""


def literal(override: str, keys: Iterable[str]) -> str:
    """``key=value`` with the value of a text key quoted: commas, brackets, spaces, ``${`` mean themselves."""
    key, _, value = override.partition("=")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if key.lstrip("+") not in keys or value == "null":
        return override
    if quoted:
        return override.replace("${", "\\${")
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), value.replace("${", "\\${"))
    return f"{key}='{escaped}'"


def quote_names(override: str) -> str:
    """``key=[a,b]`` of a list of names with each name quoted: 0012 and 12e5 are ids of photographs, not numbers."""
    key, _, value = override.partition("=")
    plain = value[:1] == "[" and value[-1:] == "]" and not set("'\"[]{}$\\") & set(value[1:-1])
    if key.lstrip("+") not in NAMES or not plain or not value[1:-1].strip():
        return override
    return f"{key}=[{','.join(repr(name.strip()) for name in value[1:-1].split(','))}]"


def run(
    task: Callable[[DictConfig], None],
    name: str,
    config_dir: Path,
    read: Callable[[list[str]], list[str]] = list,
    program: bool = False,
    last_line: str = INTERRUPTED,
) -> int:
    """Compose the configuration from the command line and call ``task``; the exit code (0, 2, 130 or 143).

    ``program``: the process ends with the command (see ``obey``). ``last_line`` is said when it is interrupted.
    """
    parser = get_args_parser()
    args = parser.parse_args()
    words = [quote_names(word) for word in read(args.overrides)]
    keys = {override.lstrip("+~").split("=")[0] for override in words}
    args.overrides = [f"{key}={value}" for key, value in HYDRA_SETTINGS.items() if key not in keys] + words
    quiet_libraries()
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
            for line in find_shadows(choices) if rank() == 0 else ():
                print(line)
            refuse_missing(cfg)
            check_options(cfg, name, choices, config_dir)
            refuse_logger(cfg)
            check_wandb(cfg)
            task(cfg)
        except Exception as error:
            raise _Leave from error

    failure: BaseException | None = None
    made.clear()
    try:
        with obey(last_line if rank() == 0 else "", program):
            if args.help:
                show(help_text(task, name, config_dir))
            else:
                register()
                hydra.version.setbase("1.3")
                _run_hydra(args, parser, job, str(config_dir), name)
    except _Leave as leave:
        failure = leave.__cause__
    except (HydraException, OmegaConfBaseException) as error:
        failure = UserError(explain(error, name, words, config_dir))
    except (UserError, KeyboardInterrupt) as error:
        failure = error
    except ValueError as error:  # Hydra: an option of a group that is a number
        if "Config group override" not in str(error):
            raise
        failure = UserError(one_line(error))
    code = report(failure, last_line)
    if code == 2:
        remove_made()
    return code


def check_options(cfg: DictConfig, name: str, choices: Mapping[str, str | None], config_dir: Path) -> None:
    """UserError for an option whose value is of another kind than its default, or out of range."""
    for group, option in default_groups(name, config_dir).items():
        if option is not None and choices.get(group) is None:
            raise UserError(f"{group}= needs one of {', '.join(group_options(group, name, config_dir))}")
    base = compose(name, [f"{group}={option}" for group, option in choices.items() if option], config_dir)
    defaults = dict(flatten(OmegaConf.to_container(base, resolve=False)))
    check_groups(OmegaConf.to_container(cfg, resolve=False), defaults)
    for key, value in defaults.items():
        if isinstance(value, str) and "${" in value:
            with suppress(OmegaConfBaseException):  # it refers to what has no default
                defaults[key] = OmegaConf.select(base, key)
    try:
        check_values(OmegaConf.to_container(cfg, resolve=True), defaults)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from None


def show(text: str) -> None:
    """Print ``text``; who reads it may stop early, as ``head`` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is not tried again at the end


def report(error: BaseException | None, last_line: str = INTERRUPTED) -> int:
    """Exit code; what a user can mend or wanted is said in one line, what is a bug of ours is raised again."""
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        if rank() == 0:
            print(last_line, file=sys.stderr)
        return error.code if isinstance(error, Interrupt) else 130
    error = find_user_error(error)
    if not isinstance(error, UserError):
        raise error
    line = one_line(error).encode("utf-8", "replace").decode()  # a word of the command line need not be UTF-8
    print(f"harmony: error: {line}", file=sys.stderr)
    return 2


def find_user_error(error: BaseException) -> BaseException:
    """The UserError in or for an error of Hydra or the system that a user can mend, else the error itself."""
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, (UserError, OSError)):
        error = error.__cause__  # raised by what a _target_ names
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        place = f" ({error.filename})" if error.filename else ""
        return UserError(f"disk full{place}; free some space, the same command goes on")
    if isinstance(error, OSError) and error.filename and error.strerror:
        return UserError(f"{str(error.filename)[:200]}: {error.strerror}; check this path")
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):
        return UserError(f"{one_line(error)}: give another path")
    return error


def entry(
    name: str,
    config_dir: str | Path = CONFIGS,
    read: Callable[[list[str]], list[str]] = list,
    last_line: str = INTERRUPTED,
) -> Callable[[Callable[[DictConfig], None]], Callable]:
    """Decorator: ``main(cfg)`` becomes a command over ``<config_dir>/<name>.yaml``; called with a cfg it just runs.

    ``read`` turns the words of the command line into overrides, where a command takes words that Hydra does not.
    ``last_line`` is said when the command is interrupted.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable:
        @functools.wraps(task)
        def main(cfg: DictConfig | None = None) -> None:
            if cfg is not None:
                return task(cfg)
            program = sys._getframe(1).f_globals.get("__name__") == "__main__"
            code = run(task, name, Path(config_dir).resolve(), read, program, last_line)
            if code:
                sys.exit(code)

        return main

    return decorate
