"""``python -m harmony.evaluate controlnet=RUN dataset=NAME`` or ``experiment=table1``: figures on held-out data.

Without an experiment: one method, before (words alone) and after. Studies compare methods on the same pictures, holes
and noise; finished pictures are not made again by the same command, and
``torchrun --nproc-per-node N -m harmony.evaluate`` shares them out among processes.
"""

import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from harmony.cli.artifacts import Artifact, manifest_artifact, model_artifact
from harmony.cli.command import entry
from harmony.cli.logger import (
    as_one_line,
    build_logger,
    close_logger,
    is_wandb,
    log_artifacts,
    log_page,
    log_pictures,
    log_table,
)
from harmony.cli.methods import build, complete, row_facts, row_override
from harmony.cli.provenance import provenance
from harmony.cli.run_folder import device, make_folder, rank, run_folder, world
from harmony.core.files import write_json
from harmony.data.preparation import ensure
from harmony.evaluation.report import Report

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from harmony.evaluation.study import Study
    from harmony.methods.method import Method


def protocol(cfg: DictConfig) -> str:
    """How pictures are sampled, as tables say it."""
    solver = "DDIM" if cfg.solver == "ddim" else cfg.solver
    guidance = "" if cfg.guidance is None else f", guidance {cfg.guidance:g}"
    return f"{solver} {cfg.steps} steps{guidance}, seed {cfg.seed}"


def study(cfg: DictConfig, folder: Path, nodes: list[dict]) -> "Study":
    """The study that the configuration names, ready to be measured.

    ``nodes`` is filled with the configurations of the methods and judges that it builds.
    """
    from harmony.evaluation.study import StudyRun
    from harmony.models.shipped import check_places
    from harmony.sampling.guidance import Settings

    recipe = OmegaConf.to_container(cfg.dataset, resolve=True)
    run = StudyRun(
        cfg.name, folder, cfg.split, cfg.limit, cfg.seed, Settings(cfg.steps, cfg.guidance or 1.0), protocol(cfg),
        cfg.clip, cfg.evaluator, OmegaConf.to_container(cfg.metrics), rank(), world(), device(),
        prepare=lambda: ensure(recipe, cfg.model.path, cfg.paths.work),
        load=lambda: instantiate(cfg.model).to(device()),
        build=lambda options: build_node(complete(cfg, options)),
        method=lambda: build_node(OmegaConf.to_container(cfg.method, resolve=True)),
    )  # fmt: skip

    def build_node(node: dict) -> "Method":
        nodes.append(node)
        return build(node, run.backbone)

    options = OmegaConf.to_container(cfg.study, resolve=True)
    if "rows" in options:
        options["rows"] = {name: row_facts(name, node) for name, node in cfg.study.rows.items()}
    if "sweep" in options:
        options["sweep"] = row_facts("sweep", cfg.study.sweep) or None
        for facts in (*options["rows"].values(), options["sweep"]):
            check_places((facts or {}).get("options", {}))
    nodes += [{"evaluator": judge} for judge in (options.get("evaluators") or {}).values()]
    return get_class(options.pop("_target_"))(run, **options)


def overrides(words: list[str]) -> list[str]:
    """The command line for Hydra: a row of a study may be new, and stored:FOLDER is text."""
    return [row_override(word) for word in words]


@entry("evaluate", read=overrides)
def main(cfg: DictConfig) -> None:
    """Figures, table and picture of one method or of a study; with ``inputs`` what other programs need for it."""
    from harmony.evaluation.pages import write_page

    start = time.monotonic()
    if cfg.inputs is not None:
        if rank() == 0:
            inputs = make_folder(cfg.inputs)
            study(cfg, inputs, []).write_inputs(inputs)
            print(inputs)
        return
    folder = run_folder(cfg)
    nodes: list[dict] = []
    measurement = study(cfg, folder, nodes)
    report = measurement.measure()
    if rank() > 0:
        return
    facts = report.facts | {"wall_time_s": round(time.monotonic() - start, 1)}
    write_json(folder / "provenance.json", provenance(cfg, **facts))
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    page = write_page(folder, f"{cfg.name} {folder.name}", report.text, config, report.rows, facts["count"])
    write_json(folder / "metrics.json", report.figures)
    if is_wandb(cfg):
        with as_one_line():
            log(cfg, folder, report, page, list_inputs(cfg, measurement, report, nodes))
    print(f"\n{report.text}")
    print(folder, page, *report.pictures, sep="\n")


def number(cell: str) -> float | None:
    """A cell of table.csv; None for an empty one."""
    return float(cell) if cell else None


def list_inputs(cfg: DictConfig, measurement: "Study", report: Report, nodes: list[dict]) -> list[Artifact]:
    """What the figures were made of, for W&B: the manifest if any, and the networks in ``nodes`` that lie here."""
    from harmony.models.shipped import list_networks

    manifests = [measurement.run.manifest] if "manifest" in report.facts else []
    folders = dict.fromkeys(folder.resolve() for node in nodes for folder in list_networks(node))
    return [*(manifest_artifact(cfg.dataset.name, path) for path in manifests), *map(model_artifact, folders)]


def log(cfg: DictConfig, folder: Path, report: Report, page: Path, inputs: list[Artifact]) -> None:
    """The same to W&B: figures, tables, pictures, and what they were made of."""
    logger = build_logger(cfg, "evaluate")
    try:
        log_report(logger, folder, report, page)
        log_artifacts(logger, inputs, [])
    finally:
        close_logger(logger)


def log_report(logger: "Logger", folder: Path, report: Report, page: Path) -> None:
    """Give W&B the figures, their table, the pictures and the page of a report."""
    logger.log_metrics(report.figures)
    if (folder / "table.csv").exists():
        with open(folder / "table.csv", newline="") as file:
            head, *rows = csv.reader(file)
        log_table(logger, "table", head, [[name, *map(number, cells)] for name, *cells in rows])
    for picture in report.pictures:  # W&B offline keeps pictures in a table apart from the rest
        logger.log_image(picture.stem, [str(picture)])
    log_page(logger, page)
    log_pictures(logger, {row.id: row.pictures for row in report.rows}, report.samples)


if __name__ == "__main__":
    main()
