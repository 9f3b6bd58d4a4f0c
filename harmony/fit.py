"""``python -m harmony.fit experiment=NAME``: prepare what is missing, train, evaluate before and after, export."""

import os
import time
from pathlib import Path

import lightning
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harmony.cli.config import entry, literal, provenance, rank, run_folder
from harmony.core.files import write_json
from harmony.data.manifest import manifest_hash
from harmony.data.preparation import ensure
from harmony.data.shards import hand_over, predictor
from harmony.models.backbone import DIFFUSION
from harmony.training.callbacks import AtomicCheckpoints, trainer_callbacks


def settle_precision(cfg: DictConfig) -> dict[str, str]:
    """Decide what ``trainer.precision: null`` and ``model.dtype: auto`` mean, both together; the facts are returned.

    null: bf16-mixed where the task has frozen networks and they are bfloat16, else 32-true. auto: bfloat16 where the
    trainer is told to compute in it, or where it is told nothing and runs on a GPU; else float32.
    """
    asked, frozen = cfg.trainer.precision, isinstance(cfg.module.get("kit"), DictConfig)
    gpu = cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if cfg.model.dtype == "auto":
        cfg.model.dtype = "bfloat16" if (gpu if asked is None else "bf16" in str(asked)) else "float32"
    if asked is None:
        cfg.trainer.precision = "bf16-mixed" if frozen and cfg.model.dtype == "bfloat16" else "32-true"
    facts = {"precision": str(cfg.trainer.precision)}
    return facts | {"frozen_networks": cfg.model.dtype} if frozen else facts


def train(cfg: DictConfig, folder: Path) -> tuple[lightning.Trainer, lightning.LightningModule]:
    """Build data, module and trainer from the configuration and fit, going on from the last checkpoint."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    data, module = (instantiate(node, _convert_="all") for node in (cfg.data, cfg.module))
    if hasattr(module, "check"):
        module.check(data)
    if hasattr(data, "prepare"):
        data.prepare(first := predictor(instantiate(cfg.trainer, _partial_=True, _convert_="all")))
    logger = instantiate(cfg.logger)
    callbacks = trainer_callbacks(instantiate(cfg.callbacks, _convert_="all"))
    trainer = instantiate(cfg.trainer, _partial_=True, _convert_="all")(
        default_root_dir=str(folder),
        logger=logger,
        callbacks=callbacks,
        plugins=[AtomicCheckpoints()],
        use_distributed_sampler=False,  # the stream shares out the samples itself
        enable_progress_bar=False,  # Throughput reports rate and end in lines that a log file can hold
    )
    if hasattr(data, "prepare"):
        hand_over(first, trainer)
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return trainer, module


def overrides(words: list[str]) -> list[str]:
    """The command line for Hydra, whose grammar knows no angle brackets: token=<mug>."""
    return [literal(word, ("token",)) for word in words]


@entry("fit", read=overrides)
def main(cfg: DictConfig) -> None:
    """Train what the experiment names; the same command goes on with an interrupted run."""
    began = time.monotonic()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_float32_matmul_precision("high")
    folder = run_folder(cfg)
    ensure(OmegaConf.to_container(cfg.dataset, resolve=True), cfg.model.path, cfg.paths.work)
    precision = settle_precision(cfg)
    if rank() == 0:
        print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in precision.items()), flush=True)
    trainer, module = train(cfg, folder)
    if not trainer.is_global_zero:
        return
    numbers = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.endswith(("_step", "_epoch"))}
    measured, text = {}, ""
    if hasattr(module, "export"):  # the parts of a kit write themselves into their kit
        home = module.kit.device if hasattr(module, "kit") else module.device
        module.eval().requires_grad_(False).to(home)  # Lightning has moved it to the CPU
        known = OmegaConf.to_container(cfg.data.get("hints") or OmegaConf.create(), resolve=True)
        module.export(folder / "export", known)
    if (e := cfg.evaluate) is not None:
        from harmony.evaluation.eval_sets import before_and_after, table
        from harmony.sampling.guidance import Settings

        settings = Settings(e.steps, e.guidance, e.seed)
        methods = module.methods(settings, known).values()
        figures, measured = before_and_after(module.kit, Path(cfg.data.manifest), *methods, settings, e.split, e.limit)
        numbers |= figures
        text = f"\n{table(figures, e.split, **measured)}\n"
    kit, data = instantiate(cfg.model), trainer.datamodule
    seen = {"pictures": data.hashes()} if hasattr(data, "hashes") else {"manifest": manifest_hash(cfg.data.manifest)}
    facts = provenance(
        cfg,
        **precision,
        **measured,
        **seen,
        kit={part: kit.hash(part) for part in DIFFUSION},
        wall_time_s=round(time.monotonic() - began, 1),
    )
    write_json(folder / "provenance.json", facts)
    if trainer.logger is not None:
        trainer.logger.log_metrics(numbers, step=trainer.global_step)
        trainer.logger.finalize("success")
        if hasattr(trainer.logger.experiment, "finish"):  # W&B: flush, and let a sweep's next run be one of its own
            trainer.logger.experiment.finish()
    write_json(folder / "metrics.json", numbers)
    grids = sorted((folder / "grids").glob("*.png"))
    print(f"{text}\n{folder}" if text else folder)  # last, below what the logger has to say
    if grids:
        print(grids[-1])


if __name__ == "__main__":
    main()
