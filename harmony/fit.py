"""``python -m harmony.fit experiment=NAME``: prepare what is missing, train, evaluate before and after, export."""

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from harmony.cli.artifacts import Artifact, latents_artifact, manifest_artifact, model_artifact
from harmony.cli.command import entry, literal
from harmony.cli.logger import as_one_line, build_logger, close_logger, log_artifacts, log_page, log_pictures
from harmony.cli.provenance import provenance
from harmony.cli.run_folder import rank, run_folder
from harmony.core.errors import UserError
from harmony.core.files import write_json
from harmony.core.progress import tell
from harmony.data.manifest import manifest_hash
from harmony.data.preparation import ensure
from harmony.data.shards import hand_over, predictor
from harmony.evaluation.pages import read_grids, write_page
from harmony.evaluation.report import Report
from harmony.models.backbone import DIFFUSION
from harmony.models.shipped import find_exports
from harmony.training.callbacks import AtomicCheckpoints, list_callbacks, read_last_metrics, read_validation
from harmony.training.checkpoints import Facts, checkpoint_name, describe, restore_best
from harmony.training.schedule import find_timer
from harmony.training.task import Task


def settle_precision(cfg: DictConfig) -> dict[str, str]:
    """Decide what ``trainer.precision: null`` and ``model.dtype: auto`` mean, both together; the facts are returned.

    null: bf16-mixed where the task has frozen networks and they are bfloat16, else 32-true. auto: bfloat16 where the
    trainer is told to compute in it, or where it is told nothing and runs on a GPU; else float32.
    """
    wish, frozen = cfg.trainer.precision, isinstance(cfg.module.get("backbone"), DictConfig)
    gpu = cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if cfg.model.dtype == "auto":
        cfg.model.dtype = "bfloat16" if (gpu if wish is None else "bf16" in str(wish)) else "float32"
    if wish is None:
        cfg.trainer.precision = "bf16-mixed" if frozen and cfg.model.dtype == "bfloat16" else "32-true"
    facts = {"precision": str(cfg.trainer.precision)}
    return facts | {"frozen_networks": cfg.model.dtype} if frozen else facts


def build_trainer(cfg: DictConfig, **options: Any) -> lightning.Trainer:
    """The Trainer of the configuration. UserError for what Lightning refuses, such as a GPU that is not there."""
    try:
        return instantiate(cfg.trainer, _partial_=True, _convert_="all")(**options)
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"Lightning refuses the options of trainer: {str(error).splitlines()[0]}") from error


def build(cfg: DictConfig) -> tuple[lightning.LightningDataModule, Task]:
    """Build data and task from the configuration; nothing is read yet. UserError for what does not fit."""
    if cfg.checkpoint == "best" and (cfg.callbacks.get("best") is None or cfg.trainer.limit_val_batches == 0):
        raise UserError(
            "checkpoint=best needs callbacks.best and trainer.limit_val_batches: switch neither off, or take the last"
        )
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    data, task = (instantiate(node, _convert_="all") for node in (cfg.data, cfg.module))
    task.check(data)
    return data, task


def train(cfg: DictConfig, folder: Path, data: lightning.LightningDataModule, task: Task) -> lightning.Trainer:
    """Build the trainer from the configuration and fit, going on from the last checkpoint."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)  # whatever the preparation has drawn
    if hasattr(data, "prepare"):
        data.prepare(first := predictor(partial(build_trainer, cfg)))
    logger = build_logger(cfg, "fit")
    callbacks = instantiate(cfg.callbacks, _convert_="all")
    if cfg.checkpoint == "best":
        callbacks["best"].is_required = True
    trainer = build_trainer(
        cfg,
        default_root_dir=str(folder),
        logger=logger,
        callbacks=list_callbacks(callbacks),
        plugins=[AtomicCheckpoints()],
        use_distributed_sampler=False,  # the stream shares out the samples itself
        enable_progress_bar=False,  # Throughput reports rate and end in lines that a log file can hold
    )
    if hasattr(data, "prepare"):
        hand_over(first, trainer)
    last = folder / checkpoint_name("last")
    trainer.fit(task, data, ckpt_path=str(last) if last.exists() else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if is_validation_missing(trainer, folder):
        trainer.validate(task, data, verbose=False)
    return trainer


def is_validation_missing(trainer: lightning.Trainer, folder: Path) -> bool:
    """Whether the end of the run was not validated; the same for all processes.

    Either the clock ended it between two validations, or it was killed behind its last step, so that no step was left.
    """
    if trainer.limit_val_batches == 0 or trainer.fast_dev_run:
        return False
    timer = find_timer(trainer)
    if timer is not None and timer.time_remaining() <= 0:
        is_missing = not read_validation(folder / "metrics.csv", trainer.global_step)
    else:
        is_due = trainer.global_step * trainer.accumulate_grad_batches % trainer.val_check_batch == 0
        is_missing = not trainer.callback_metrics and is_due
    return trainer.strategy.broadcast(is_missing)  # clocks differ, and the first process alone writes metrics.csv


def choose_weights(cfg: DictConfig, folder: Path, task: Task) -> Facts:
    """Give the task the weights that ``checkpoint`` names; the facts of that checkpoint."""
    if cfg.checkpoint == "best":
        return restore_best(folder, task)
    facts, best = {"kind": "last", "step": task.trainer.global_step}, cfg.callbacks.get("best")
    value = read_validation(folder / "metrics.csv", facts["step"]).get(best.monitor) if best else None
    return facts if value is None else facts | {"figure": best.monitor, "value": value}


def overrides(words: list[str]) -> list[str]:
    """The command line for Hydra, whose grammar knows no angle brackets: token=<mug>."""
    return [literal(word, ("token",)) for word in words]


def measure(cfg: DictConfig, task: Task) -> Report:
    """The report of the task's result beside its baseline, on held-out pictures."""
    from harmony.evaluation.before_after import before_and_after, page_rows, table
    from harmony.evaluation.eval_sets import load_reconstruct
    from harmony.sampling.guidance import Settings

    e = cfg.evaluate
    settings = Settings(e.steps, e.guidance)
    items = load_reconstruct(Path(cfg.data.manifest), e.split, task.backbone.resolution, e.limit)
    methods = task.baseline(settings), task.result(settings)
    protocol = f"DDIM {e.steps} steps, guidance {e.guidance}, seed {e.seed}"
    outcome = before_and_after(task.backbone, items, *methods, e.seed, protocol)
    text = f"{table(outcome.figures, e.split, **outcome.facts)}\n"
    rows = page_rows(items, methods[1], outcome)
    return Report(outcome.figures, outcome.facts, text, rows=rows, samples=outcome.samples)


def draw_page(cfg: DictConfig, folder: Path, report: Report, figures: dict[str, float]) -> Path:
    """Write the page of a training: the pictures measured at its end, or its grids, and its ``figures``."""
    lines = ["| training | |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in sorted(figures.items()))]
    text, config = "\n".join([report.text, *lines]), (folder / "config.yaml").read_text(encoding="utf-8")
    rows = report.rows or read_grids(folder / "grids")
    return write_page(folder, f"{cfg.name} {folder.name}", text, config, rows, report.facts.get("count", len(rows)))


def data_facts(cfg: DictConfig, data: lightning.LightningDataModule) -> dict:
    """What the run was trained on: the manifest's hash, or those of a concept's pictures."""
    return {"pictures": data.hashes()} if hasattr(data, "hashes") else {"manifest": manifest_hash(cfg.data.manifest)}


def list_inputs(cfg: DictConfig, data: lightning.LightningDataModule) -> list[Artifact]:
    """What the run was trained on, for W&B: the manifest if any, and its latent caches."""
    if (path := cfg.data.get("manifest")) is None:
        return []
    artifacts, indices = [manifest_artifact(cfg.dataset.name, Path(path))], getattr(data, "indices", None)
    return artifacts + ([latents_artifact(cfg.dataset.name, indices)] if indices else [])


def log_end(cfg: DictConfig, trainer: lightning.Trainer, report: Report, page: Path, checkpoint: Facts) -> None:
    """Give the logger what there is at the end of a run."""
    logger, folder = trainer.logger, page.parent
    log_page(logger, page)
    log_pictures(logger, {row.id: row.pictures for row in report.rows}, report.samples)
    facts = {"run": folder.name, "checkpoint": checkpoint}
    models = [model_artifact(network, facts, [checkpoint["kind"]]) for network in find_exports(folder)]
    log_artifacts(logger, list_inputs(cfg, trainer.datamodule), models)


@entry("fit", read=overrides)
def main(cfg: DictConfig) -> None:
    """Train what the experiment names; the same command goes on with an interrupted run."""
    start = time.monotonic()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_float32_matmul_precision("high")
    folder = run_folder(cfg)
    precision = settle_precision(cfg)
    data, task = build(cfg)  # what does not fit is refused before hours of preparation
    ensure(OmegaConf.to_container(cfg.dataset, resolve=True), cfg.model.path, cfg.paths.work)
    if rank() == 0:
        tell(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in precision.items()))
    trainer = train(cfg, folder, data, task)
    if not trainer.is_global_zero:
        return
    figures = read_last_metrics(folder / "metrics.csv")  # also those of steps before an interruption
    figures |= {k: float(v) for k, v in trainer.callback_metrics.items() if not k.endswith(("_step", "_epoch"))}
    checkpoint = choose_weights(cfg, folder, task)
    if cfg.checkpoint == "best":
        figures |= read_validation(folder / "metrics.csv", checkpoint["step"])
    task.eval().requires_grad_(False).to(task.home)  # Lightning has moved it to the CPU
    task.export(folder / "export")
    tell(f"exported checkpoint: {describe(checkpoint)}")
    report = measure(cfg, task) if cfg.evaluate is not None else Report()
    page = draw_page(cfg, folder, report, figures)
    figures |= report.figures
    backbone = instantiate(cfg.model)
    facts = report.facts | {"backbone": {part: backbone.hash(part) for part in DIFFUSION}}
    facts |= data_facts(cfg, trainer.datamodule)
    facts |= {"checkpoint": checkpoint, "wall_time_s": round(time.monotonic() - start, 1)}
    write_json(folder / "provenance.json", provenance(cfg, **precision, **facts))
    write_json(folder / "metrics.json", figures)
    if trainer.logger is not None:
        with as_one_line():
            trainer.logger.log_metrics(figures, step=trainer.global_step)
            log_end(cfg, trainer, report, page, checkpoint)
        close_logger(trainer.logger)
    grids = sorted((folder / "grids").glob("*.png"))
    print(f"\n{report.text}\n{folder}" if report.text else folder)  # last, below what the logger has to say
    print(page, *grids[-1:], sep="\n")


if __name__ == "__main__":
    main()
