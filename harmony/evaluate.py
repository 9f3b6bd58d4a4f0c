"""``python -m harmony.evaluate controlnet=RUN dataset=NAME`` or ``experiment=table1``: figures on held-out data.

Without an experiment: one trained ControlNet, before (weight 0) and after. An experiment with a ``study`` compares
methods on the same pictures, holes and noise; finished pictures are not made again by the same command, and
``torchrun --nproc-per-node N -m harmony.evaluate`` shares them out among processes.
"""

import time
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harmony.cli.config import device, entry, provenance, rank, run_folder, world
from harmony.core.files import write_json, write_text
from harmony.data.manifest import manifest_hash
from harmony.data.preparation import ensure


def before_after(cfg: DictConfig, kit, manifest: Path, folder: Path) -> tuple[dict, dict, str, list[Path]]:
    """(figures, facts, table, pictures) of one ControlNet."""
    from harmony.evaluation.eval_sets import before_and_after, by_hints, load_bench, sample_grid, table
    from harmony.methods.insert import Branch, asked_settings, hints
    from harmony.models.backbone import placed
    from harmony.models.controlnet import load_controlnet, read_hint
    from harmony.pixels.images import from_model, write_image

    facts = {"branch": "color", "parameters": {}} | read_hint(cfg.controlnet)
    net = placed(load_controlnet(cfg.controlnet, kit.dtype), kit.device)
    branch = Branch(facts["branch"], net, cfg.weight, facts["parameters"])
    settings = asked_settings(cfg)
    methods = [by_hints(kit, branches, settings) for branches in ([], [branch])]
    metrics, measured = before_and_after(kit, manifest, *methods, settings, cfg.split, cfg.limit, cfg.clip)
    shown = load_bench(manifest, cfg.split, kit.resolution, 16)
    seen = [from_model(2 * hint - 1) for hint in hints(branch, shown.given(), [e.mask for e in shown.examples])]
    off, on = (method(shown) for method in methods)
    picture = folder / "grids" / "samples.png"
    picture.parent.mkdir(exist_ok=True)
    write_image(picture, sample_grid(shown, {"hint": seen, "hint off": off, "output": on}))
    text = f"{table(metrics, cfg.split, **measured)}\n"
    write_text(folder / "table.md", text)
    return metrics, measured, text, [picture]


def study(cfg: DictConfig, kit, manifest: Path, folder: Path):
    """The study of the configuration, with this process's share of its outputs."""
    from harmony.evaluation.comparison import Study
    from harmony.methods.insert import asked_settings

    settings, share = asked_settings(cfg), (rank(), world())
    if cfg.study.bench == "editing":
        from harmony.evaluation.editing import EditingStudy

        spec = OmegaConf.to_container(cfg.study, resolve=True)
        return EditingStudy(cfg.name, spec, cfg.words, kit, manifest, folder, settings, cfg.limit, *share, cfg.clip)
    if cfg.study.bench == "judge":
        from harmony.evaluation.judges import JudgeStudy

        evaluators = OmegaConf.to_container(cfg.study.evaluators)
        return JudgeStudy(cfg.name, evaluators, manifest, folder, cfg.split, kit.resolution, cfg.limit, cfg.seed)
    nodes = (cfg.study, cfg.controlnets, cfg.painters)
    spec, nets, painters = (OmegaConf.to_container(node, resolve=True) for node in nodes)
    at = kit, manifest, folder, settings, cfg.split, cfg.limit
    return Study(cfg.name, spec, nets, painters, *at, *share, cfg.clip)


def measured(cfg: DictConfig, folder: Path) -> tuple[dict, dict, str, list[Path]]:
    """(figures, facts, table, pictures) of what the configuration asks for; people need neither dataset nor kit."""
    if cfg.study.bench == "user_study":
        from harmony.evaluation.user_study import UserStudy

        spec = OmegaConf.to_container(cfg.user_study, resolve=True)
        return UserStudy(cfg.name, spec, folder, cfg.limit, cfg.seed, rank()).measure()
    manifest = ensure(OmegaConf.to_container(cfg.dataset, resolve=True), cfg.model.path, cfg.paths.work)
    kit = instantiate(cfg.model).to(device())
    if cfg.study.bench is None:
        metrics, facts, text, pictures = before_after(cfg, kit, manifest, folder)
    else:
        metrics, facts, text, pictures = study(cfg, kit, manifest, folder).measure()
    return metrics, facts | {"manifest": manifest_hash(manifest)}, text, pictures


@entry("evaluate")
def main(cfg: DictConfig) -> None:
    """Figures, table and picture of one ControlNet or of a study."""
    began = time.monotonic()
    folder = run_folder(cfg)
    metrics, facts, text, pictures = measured(cfg, folder)
    if rank() > 0:
        return
    write_json(folder / "provenance.json", provenance(cfg, **facts, wall_time_s=round(time.monotonic() - began, 1)))
    log(cfg, folder, metrics, pictures)
    write_json(folder / "metrics.json", metrics)
    print(f"\n{text}")
    print(folder, *pictures, sep="\n")


def number(cell: str) -> float | None:
    """A cell of table.csv; None for an empty one."""
    return float(cell) if cell else None


def log(cfg: DictConfig, folder: Path, metrics: dict, pictures: list[Path]) -> None:
    """The same to W&B, where that is the logger: the table as a table of numbers, the figures as pictures."""
    logger = instantiate(cfg.logger)
    if not hasattr(logger, "log_table"):
        return
    import csv

    logger.log_metrics(metrics)
    if (folder / "table.csv").exists():
        with open(folder / "table.csv", newline="") as file:
            head, *rows = csv.reader(file)
        logger.log_table("table", columns=head, data=[[name, *map(number, cells)] for name, *cells in rows])
    for picture in pictures:
        logger.log_image(picture.stem, [str(picture)])
    logger.experiment.finish()


if __name__ == "__main__":
    main()
