"""The experiment logger of a command, and what W&B gets beside figures: the page, tables, artifacts."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harmony.cli.artifacts import WEIGHTS, Artifact, to_name
from harmony.cli.compose import one_line
from harmony.core.errors import UserError
from harmony.core.progress import tell

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from wandb import Run

# W&B's own switch, which comes before logger.offline: its values, and what they mean for it.
OFFLINE = {"offline": True, "dryrun": True, "online": False, "run": False, "shared": False}
DISABLED = "disabled"
# options of the logger that are null until W&B's own variables, or these values, set them
VARIABLES = {"project": "WANDB_PROJECT", "entity": "WANDB_ENTITY", "name": "WANDB_NAME", "group": "WANDB_RUN_GROUP"}
PROJECT = "harmony"
TAG = 64  # characters of a tag, which W&B takes
NAME = 128  # characters of a name


def is_wandb(cfg: DictConfig) -> bool:
    """Whether a configuration logs to W&B."""
    is_there = str(OmegaConf.select(cfg, "logger._target_") or "").endswith("WandbLogger")
    return is_there and os.environ.get("WANDB_MODE") != DISABLED


def is_offline(cfg: DictConfig) -> bool:
    """Whether W&B writes files alone. UserError for a WANDB_MODE that W&B does not know."""
    mode = os.environ.get("WANDB_MODE", "")
    if mode and mode not in OFFLINE:
        raise UserError(f"WANDB_MODE={mode}: choose one of {', '.join((*OFFLINE, DISABLED))}, or unset it")
    return OFFLINE.get(mode, bool(cfg.logger.offline))


def check_wandb(cfg: DictConfig) -> None:
    """UserError where W&B is to log online and nobody is logged in; asked before anything is done."""
    if not is_wandb(cfg) or is_offline(cfg):
        return
    import wandb

    try:
        wandb.login()
    except (wandb.Error, ValueError) as error:
        line = one_line(error)[:200]
        raise UserError(f"W&B lets nobody in ({line}): run `wandb login`, or leave out logger.offline=false") from None


def build_logger(cfg: DictConfig, job: str) -> "Logger":
    """The logger of the configuration, which knows the whole configuration; ``job``: the command.

    A run of W&B is named by its run folder, in the group of its experiment; a run that goes on keeps its id. W&B is
    told to be quiet where it is offline: everything it says is in the run folder. With WANDB_MODE=disabled nothing is
    logged and no folder is written.
    """
    if not is_wandb(cfg):
        is_dummy = os.environ.get("WANDB_MODE") == DISABLED
        return instantiate({"_target_": "lightning.pytorch.loggers.logger.DummyLogger"} if is_dummy else cfg.logger)
    folder, options = Path(cfg.paths.run), {"offline": is_offline(cfg), "tags": list_tags(cfg)}
    own = {"project": PROJECT, "name": f"{folder.parent.name}/{folder.name}", "group": folder.parent.name}
    for option, variable in VARIABLES.items():
        value = OmegaConf.select(cfg.logger, option) or os.environ.get(variable) or own.get(option)
        options[option] = value and str(value)[:NAME]
    options["job_type"] = os.environ.get("WANDB_JOB_TYPE") or job
    options["id"] = os.environ.get("WANDB_RUN_ID") or find_id(folder)
    if options["offline"]:
        os.environ.setdefault("WANDB_SILENT", "true")
    logger = instantiate(cfg.logger, **options)
    logger._wandb_init.pop("anonymous", None)  # Lightning always passes it, and W&B warns of it
    logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    return logger


def list_tags(cfg: DictConfig) -> list[str]:
    """The tags of a run: dataset, backbone, those of the configuration and of W&B's own variable."""
    tags = [cfg.dataset.name, Path(str(cfg.model.path)).name, *(cfg.logger.tags or ())]
    tags += os.environ.get("WANDB_TAGS", "").split(",")
    return list(dict.fromkeys(str(tag).strip()[:TAG] for tag in tags if str(tag or "").strip()))


def find_id(folder: Path) -> str | None:
    """The id of the run of W&B that began in a run folder; None where none did."""
    files = sorted((folder / "wandb").glob("*run-*/run-*.wandb"), key=lambda file: file.parent.name)
    return files[-1].stem.removeprefix("run-") if files else None


def run_of(logger: "Logger | None") -> "Run | None":
    """The run of W&B that a logger writes to; None for another logger."""
    return logger.experiment if type(logger).__name__ == "WandbLogger" else None  # a dummy has every method


@contextmanager
def as_one_line() -> Iterator[None]:
    """What W&B refuses at the end of a run is one line: the run is complete without it."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        tell(f"W&B did not take everything ({reason}); the run folder has it all")


@contextmanager
def stage_in(folder: str | os.PathLike) -> Iterator[None]:
    """Let W&B keep copies of files, until it sends them, in this folder rather than in the user's home."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def log_page(logger: "Logger | None", page: Path) -> None:
    """Show the page of a run in W&B, where that is the logger."""
    if run := run_of(logger):
        import wandb

        run.log({"report": wandb.Html(str(page), inject=False)})


def log_table(logger: "Logger | None", name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Log a table to W&B, where that is the logger; cells may be missing (None)."""
    if run := run_of(logger):
        import wandb

        with stage_in(Path(logger.save_dir) / "wandb"):
            run.log({name: wandb.Table(columns=list(columns), data=list(rows), allow_mixed_types=True)})


def log_pictures(
    logger: "Logger | None", pictures: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Mapping[str, Any]]
) -> None:
    """Log the table ``pictures`` to W&B, where that is the logger: a row a picture, by whose ids runs can be joined.

    ``pictures``: id -> {column -> picture uint8 H x W x 3}, of some; ``samples``: id -> ``caption`` and figures, of
    all that have any.
    """
    ids = list(dict.fromkeys((*samples, *pictures)))
    if run_of(logger) is None or not ids:
        return
    import wandb

    rows = {key: {"id": key, **samples.get(key, {})} for key in ids}
    for key, row in pictures.items():
        rows[key] |= {column: wandb.Image(picture) for column, picture in row.items()}
    texts = [name for name in ("id", "caption") if any(name in row for row in rows.values())]
    titles = list(dict.fromkeys(title for row in pictures.values() for title in row))
    figures = sorted({name for row in rows.values() for name in row} - {*texts, *titles})
    columns = [*texts, *titles, *figures]
    log_table(logger, "pictures", columns, [[row.get(name) for name in columns] for row in rows.values()])


def log_artifacts(logger: "Logger | None", inputs: Iterable[Artifact], results: Iterable[Artifact]) -> None:
    """Tell W&B, where that is the logger, what a run was made of and what came of it."""
    run = run_of(logger)
    if run is None:
        return
    with stage_in(Path(logger.save_dir) / "wandb"):
        for artifact in inputs:
            mark_input(run, to_wandb(artifact))
        for artifact in results:
            run.log_artifact(to_wandb(artifact), aliases=["latest", *artifact.aliases])


def to_wandb(artifact: Artifact) -> Any:
    """An artifact as W&B's own object. Weights are not copied: W&B reads them where they lie when it sends them."""
    import wandb

    result = wandb.Artifact(to_name(artifact.name, artifact.kind), artifact.kind, metadata=dict(artifact.facts))
    for name, path in artifact.files.items():
        keep = {"policy": "immutable", "skip_cache": True} if path.suffix == WEIGHTS else {}
        result.add_file(str(path.resolve()), name, **keep)
    return result


def mark_input(run: "Run", artifact: Any) -> None:
    """Note that a run depends on an artifact.

    W&B's public call refuses offline. It writes a record, and offline the same one is written here.
    """
    if not run.settings._offline:
        run.use_artifact(artifact)
    elif hasattr(run, "_log_artifact"):
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        tell(f"W&B offline notes no input any more: {artifact.name} is missing from the lineage")


def close_logger(logger: "Logger") -> None:
    """End the run of a logger; W&B sends what is left, and the next run of this process is one of its own."""
    with as_one_line():
        logger.finalize("success")
        if run := run_of(logger):
            run.finish()
