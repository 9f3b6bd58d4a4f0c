"""The experiment logger of a command, and what W&B gets beside figures: pages, tables with pictures, artifacts."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from wandb import Run

# W&B's own switch, which comes before logger.offline: its values, and what they mean for it.
OFFLINE = {"offline": True, "dryrun": True, "online": False, "run": False}
WEIGHTS = ".safetensors"
TAG = 64  # characters of a tag, which W&B takes


@dataclass(frozen=True)
class Artifact:
    """Files that a run used or made, as W&B shows them with their lineage.

    ``kind``: dataset, cache or model; ``files``: name -> a file, or a folder with all that is in it; ``facts``: what
    is shown of it; ``aliases``: beside ``latest``.
    """

    name: str
    kind: str
    files: Mapping[str, Path]
    facts: Mapping[str, Any] = field(default_factory=dict)
    aliases: Sequence[str] = ()


def build_logger(cfg: DictConfig, job: str) -> "Logger":
    """The logger of the configuration, which knows the whole configuration; ``job``: the command.

    A run of W&B is named by its run folder, in the group of its experiment; a run that goes on keeps its id. W&B is
    told to be quiet where it is offline: everything it says is in the run folder. With WANDB_MODE=disabled nothing is
    logged and no folder is written.
    """
    if not cfg.logger._target_.endswith("WandbLogger"):
        return instantiate(cfg.logger)
    mode = os.environ.get("WANDB_MODE", "")
    if mode == "disabled":
        return instantiate({"_target_": "lightning.pytorch.loggers.logger.DummyLogger"})
    folder = Path(cfg.paths.run)
    options: dict[str, Any] = {"offline": OFFLINE.get(mode, cfg.logger.offline), "job_type": job}
    options["name"] = cfg.logger.name or f"{folder.parent.name}/{folder.name}"
    own = (cfg.dataset.name, Path(str(cfg.model.path)).name)
    options["tags"] = [str(tag)[:TAG] for tag in (*own, *(cfg.logger.tags or ()))]
    if "WANDB_RUN_ID" not in os.environ and (known := find_id(folder)):
        options["id"] = known
    if options["offline"]:
        os.environ.setdefault("WANDB_SILENT", "true")
    logger = instantiate(cfg.logger, **options)
    logger._wandb_init.pop("anonymous", None)  # Lightning always passes it, and W&B warns of it
    logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    return logger


def find_id(folder: Path) -> str | None:
    """The id of the run of W&B that began in a run folder; None where none did."""
    runs = sorted((folder / "wandb").glob("*run-*-*"))
    return runs[-1].name.rpartition("-")[2] if runs else None


def run_of(logger: "Logger | None") -> "Run | None":
    """The run of W&B that a logger writes to; None for another logger."""
    return logger.experiment if type(logger).__name__ == "WandbLogger" else None  # a dummy has every method


@contextmanager
def staged_in(folder: str | os.PathLike) -> Iterator[None]:
    """W&B keeps copies of files until they are sent: in this folder rather than in the user's home."""
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
    """Log a table to W&B, where that is the logger."""
    if run := run_of(logger):
        import wandb

        with staged_in(Path(logger.save_dir) / "wandb"):
            run.log({name: wandb.Table(columns=list(columns), data=list(rows), allow_mixed_types=True)})


def log_samples(
    logger: "Logger | None", rows: Iterable[tuple[str, Mapping[str, Any]]], samples: Mapping[str, Mapping[str, Any]]
) -> None:
    """Log the table ``pictures`` to W&B, where that is the logger: a row a picture, by whose ids runs can be joined.

    ``rows``: (title, {column -> picture uint8 H x W x 3}) of some pictures; ``samples``: title -> ``id``, ``caption``
    and figures of all pictures that have figures of their own; else the title is the id.
    """
    shown = dict(rows)
    titles = list(dict.fromkeys((*samples, *shown)))
    if run_of(logger) is None or not titles:
        return
    import wandb

    facts = {title: {"id": title, **samples.get(title, {})} for title in titles}
    pictures = list(dict.fromkeys(name for row in shown.values() for name in row))
    texts = [name for name in ("id", "caption") if any(name in row for row in facts.values())]
    figures = sorted({name for row in facts.values() for name in row} - {*texts})
    for title, row in shown.items():
        facts[title] |= {name: wandb.Image(picture) for name, picture in row.items()}
    columns = [*texts, *pictures, *figures]
    log_table(logger, "pictures", columns, [[row.get(name) for name in columns] for row in facts.values()])


def log_artifacts(logger: "Logger | None", used: Iterable[Artifact], results: Iterable[Artifact]) -> None:
    """Tell W&B, where that is the logger, what a run ``used`` and what came of it."""
    run = run_of(logger)
    if run is None:
        return
    with staged_in(Path(logger.save_dir) / "wandb"):
        for each in used:
            use(run, to_wandb(each))
        for each in results:
            run.log_artifact(to_wandb(each), aliases=["latest", *each.aliases])


def to_wandb(artifact: Artifact) -> Any:
    """An artifact as W&B's own object. Weights are not copied: W&B reads them where they lie when it sends them."""
    import wandb

    title = re.sub(r"[^\w.-]+", "-", artifact.name)
    result = wandb.Artifact(title, artifact.kind, metadata=dict(artifact.facts))
    for place, path in artifact.files.items():
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            name = str(Path(place) / file.relative_to(path)) if path.is_dir() else place
            keep = {"policy": "immutable", "skip_cache": True} if file.suffix == WEIGHTS else {}
            result.add_file(str(file.resolve()), name, **keep)
    return result


def use(run: "Run", artifact: Any) -> None:
    """Note that a run depends on an artifact.

    The public ``use_artifact`` refuses to work offline, so there the record is written that it writes itself.
    """
    if not run.settings._offline:
        run.use_artifact(artifact)
    elif hasattr(run, "_log_artifact"):
        run._log_artifact(artifact, aliases=["latest"], is_user_created=True, use_after_commit=True)
