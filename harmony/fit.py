"""F6. ``python -m harmony.fit experiment=NAME``: prepare what is missing, train, evaluate before and after, export."""

import os
import time
from pathlib import Path

import lightning
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harmony.config import entry, provenance, rank, run_folder, write_json
from harmony.data.manifest import manifest_hash
from harmony.prepare import ensure
from harmony.training.callbacks import AtomicCheckpoints, trainer_callbacks


def train(cfg: DictConfig, folder: Path) -> tuple[lightning.Trainer, lightning.LightningModule]:
    """Build data, module and trainer from the configuration and fit, going on from the last checkpoint if there is one."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    data, module = (instantiate(node, _convert_="all") for node in (cfg.data, cfg.module))
    if rank() == 0 and hasattr(data, "prepare"):
        data.prepare()
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
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return trainer, module


def evaluate(cfg: DictConfig, kit, branches: list) -> dict[str, float]:
    """Figures on held-out pictures with the ControlNet, and under ``baseline/`` without it (weight 0)."""
    from harmony.sampling.benchmark import feature_extractor, figures, load_bench, reconstruct
    from harmony.sampling.harmonize import Settings

    e = cfg.evaluate
    settings = Settings(e.steps, e.guidance, e.seed)
    bench = load_bench(Path(cfg.data.manifest), e.split, kit.resolution, e.limit)
    extractor = feature_extractor(kit)
    print(f"evaluating on {len(bench.examples)} {e.split} pictures: {e.steps} steps, guidance {e.guidance}, seed {e.seed}")
    before = figures(bench, reconstruct(kit, bench, [], settings), extractor)
    after = figures(bench, reconstruct(kit, bench, branches, settings), extractor)
    named = {"protocol": extractor.protocol, "count": len(bench.examples)}
    return named | {f"baseline/{name}": v for name, v in before.items()} | after


def table(metrics: dict, split: str) -> str:
    """Before / after as Markdown."""
    lines = ["| metric | before (hint off) | after |", "|---|---|---|"]
    for kind, name in (("pasted", "color_de"), ("pasted", "fpsnr"), ("pasted", "psnr"), ("pasted", "edge_f1"), ("pasted", "fid"),
                       ("pasted", "kid"), ("pasted", "seam"), ("pasted", "bg_drift"), ("raw", "bg_drift")):
        key = f"{split}/{kind}/{name}"
        if key in metrics:
            lines.append(f"| {key} | {metrics[f'baseline/{key}']:.4g} | {metrics[key]:.4g} |")
    return "\n".join(lines)


@entry("fit")
def main(cfg: DictConfig) -> None:
    """Train what the experiment names; the same command goes on with an interrupted run."""
    began = time.monotonic()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_float32_matmul_precision("high")
    folder = run_folder(cfg)
    if rank() == 0:
        ensure(OmegaConf.to_container(cfg.dataset, resolve=True), cfg.model.path, cfg.paths.work)
    trainer, module = train(cfg, folder)
    if not trainer.is_global_zero:
        return
    numbers = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.endswith(("_step", "_epoch"))}
    if cfg.evaluate is not None:
        from harmony.models.controlnet import export_controlnet
        from harmony.sampling.harmonize import Branch

        net = module.net.eval().requires_grad_(False)
        parameters = OmegaConf.to_container(cfg.data.hints, resolve=True).get(module.branch, {})
        export_controlnet(net, folder / "export", module.branch, parameters, module.kit)
        figures = evaluate(cfg, module.kit, [Branch(module.branch, net, 1.0, parameters)])
        protocol = {k: figures.pop(k) for k in ("protocol", "count")}
        numbers |= figures
        print(f"\n{table(numbers, cfg.evaluate.split)}\n\nfid and kid: {protocol['protocol']}, n = {protocol['count']}")
    facts = provenance(cfg, wall_time_s=round(time.monotonic() - began, 1), manifest=manifest_hash(cfg.data.manifest))
    write_json(folder / "provenance.json", facts)
    if trainer.logger is not None:
        trainer.logger.log_metrics(numbers, step=trainer.global_step)
        trainer.logger.finalize("success")
    write_json(folder / "metrics.json", numbers)
    grids = sorted((folder / "grids").glob("*.png"))
    print(folder)
    if grids:
        print(grids[-1])


if __name__ == "__main__":
    main()
