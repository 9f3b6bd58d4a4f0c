"""``python -m harmony.evaluate controlnet=RUN dataset=NAME`` or ``experiment=table1``: figures on held-out data.

Without an experiment: one method, before (words alone) and after. An experiment with a ``study`` compares methods on
the same pictures, holes and noise; finished pictures are not made again by the same command, and
``torchrun --nproc-per-node N -m harmony.evaluate`` shares them out among processes.
"""

import csv
import time
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harmony.cli.command import entry
from harmony.cli.methods import build, complete, row_facts, row_override
from harmony.cli.provenance import provenance
from harmony.cli.run_folder import device, rank, run_folder, world
from harmony.core.files import write_json, write_text
from harmony.data.manifest import manifest_hash
from harmony.data.preparation import ensure
from harmony.evaluation.report import Report


def protocol(cfg: DictConfig) -> str:
    """How pictures are sampled, as tables say it."""
    solver = "DDIM" if cfg.solver == "ddim" else cfg.solver
    guidance = "" if cfg.guidance is None else f", guidance {cfg.guidance:g}"
    return f"{solver} {cfg.steps} steps{guidance}, seed {cfg.seed}"


def before_after(cfg: DictConfig, backbone, manifest: Path, folder: Path) -> Report:
    """The method of the command line beside inpainting by words alone."""
    from harmony.evaluation.before_after import before_and_after, fill_set, table, views_and_outputs
    from harmony.evaluation.eval_sets import load_reconstruct, sample_grid
    from harmony.pixels.images import write_image

    method = build(cfg.method, backbone)
    baseline = build(complete(cfg, {"method": "inpainting"}), backbone)
    items = load_reconstruct(manifest, cfg.split, backbone.resolution, cfg.limit)
    figures, facts = before_and_after(backbone, items, baseline, method, cfg.seed, protocol(cfg), cfg.clip)
    shown = load_reconstruct(manifest, cfg.split, backbone.resolution, 16)
    off, on = (fill_set(shown, m, cfg.seed, what) for m, what in ((baseline, "grid, before"), (method, "grid, after")))
    picture = folder / "grids" / "samples.png"
    picture.parent.mkdir(exist_ok=True)
    write_image(picture, sample_grid(shown, views_and_outputs(shown, off, method, on)))
    text = f"{table(figures, cfg.split, **facts)}\n"
    write_text(folder / "table.md", text)
    return Report(figures, facts | {"manifest": manifest_hash(manifest)}, text, [picture])


def study(cfg: DictConfig, backbone, manifest: Path, folder: Path) -> Report:
    """What ``study`` asks for, with this process's share of its outputs."""
    spec, share = OmegaConf.to_container(cfg.study, resolve=True), {"rank": rank(), "world": world()}
    if cfg.study.eval_set == "editing":
        from harmony.evaluation.editing import EditingStudy
        from harmony.sampling.guidance import Settings

        at = backbone, manifest, folder, Settings(cfg.steps, cfg.guidance or 1.0), cfg.seed, cfg.limit
        return EditingStudy(cfg.name, spec, cfg.words, *at, **share, clip=cfg.clip).measure()
    if cfg.study.eval_set == "judge":
        from harmony.evaluation.judges import JudgeStudy

        at = manifest, folder, cfg.split, backbone.resolution, cfg.limit, cfg.seed, backbone.device
        return JudgeStudy(cfg.name, spec["evaluators"], *at).measure()
    from harmony.evaluation.comparison import Comparison, Row

    rows = {name: Row(**row_facts(name, node)) for name, node in cfg.study.rows.items()}
    sweep = Row(**row_facts("sweep", cfg.study.sweep)) if cfg.study.sweep else None
    spec |= {"evaluator": cfg.evaluator}
    return Comparison(
        cfg.name, spec, rows, lambda options: build(complete(cfg, options), backbone), backbone, manifest, folder,
        protocol(cfg), cfg.split, cfg.limit, cfg.seed, sweep, **share, clip=cfg.clip,
    ).measure()  # fmt: skip


def measure(cfg: DictConfig, folder: Path) -> Report:
    """What the configuration asks for; a user study needs neither dataset nor backbone."""
    if cfg.study.eval_set == "user_study":
        from harmony.evaluation.user_study import UserStudy

        spec = OmegaConf.to_container(cfg.user_study, resolve=True)
        return UserStudy(cfg.name, spec, folder, cfg.limit, cfg.seed, rank()).measure()
    manifest = ensure(OmegaConf.to_container(cfg.dataset, resolve=True), cfg.model.path, cfg.paths.work)
    backbone = instantiate(cfg.model).to(device())
    return (before_after if cfg.study.eval_set is None else study)(cfg, backbone, manifest, folder)


def overrides(words: list[str]) -> list[str]:
    """The command line for Hydra: a row of a study may be new, and stored:FOLDER is text."""
    return [row_override(word) for word in words]


@entry("evaluate", read=overrides)
def main(cfg: DictConfig) -> None:
    """Figures, table and picture of one method or of a study."""
    start = time.monotonic()
    folder = run_folder(cfg)
    report = measure(cfg, folder)
    if rank() > 0:
        return
    facts = report.facts | {"wall_time_s": round(time.monotonic() - start, 1)}
    write_json(folder / "provenance.json", provenance(cfg, **facts))
    log(cfg, folder, report)
    write_json(folder / "metrics.json", report.figures)
    print(f"\n{report.text}")
    print(folder, *report.pictures, sep="\n")


def number(cell: str) -> float | None:
    """A cell of table.csv; None for an empty one."""
    return float(cell) if cell else None


def log(cfg: DictConfig, folder: Path, report: Report) -> None:
    """The same to W&B, where that is the logger: the table as a table of numbers, the figures as pictures."""
    logger = instantiate(cfg.logger)
    if not hasattr(logger, "log_table"):
        return
    logger.log_metrics(report.figures)
    if (folder / "table.csv").exists():
        with open(folder / "table.csv", newline="") as file:
            head, *rows = csv.reader(file)
        logger.log_table("table", columns=head, data=[[name, *map(number, cells)] for name, *cells in rows])
    for picture in report.pictures:
        logger.log_image(picture.stem, [str(picture)])
    logger.experiment.finish()


if __name__ == "__main__":
    main()
