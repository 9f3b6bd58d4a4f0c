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

from harmony.cli.command import entry
from harmony.cli.logger import Artifact, build_logger, log_artifacts, log_page, log_samples, log_table
from harmony.cli.methods import build, complete, row_facts, row_override
from harmony.cli.provenance import provenance
from harmony.cli.run_folder import device, make_folder, rank, run_folder, world
from harmony.core.files import write_json
from harmony.data.preparation import ensure
from harmony.evaluation.report import Report

if TYPE_CHECKING:
    from harmony.evaluation.study import Study, StudyRun


def protocol(cfg: DictConfig) -> str:
    """How pictures are sampled, as tables say it."""
    solver = "DDIM" if cfg.solver == "ddim" else cfg.solver
    guidance = "" if cfg.guidance is None else f", guidance {cfg.guidance:g}"
    return f"{solver} {cfg.steps} steps{guidance}, seed {cfg.seed}"


def study(cfg: DictConfig, folder: Path) -> "Study":
    """The study that the configuration names, ready to be measured."""
    from harmony.evaluation.study import StudyRun
    from harmony.models.shipped import check_places
    from harmony.sampling.guidance import Settings

    recipe = OmegaConf.to_container(cfg.dataset, resolve=True)
    run = StudyRun(
        cfg.name, folder, cfg.split, cfg.limit, cfg.seed, Settings(cfg.steps, cfg.guidance or 1.0), protocol(cfg),
        cfg.clip, cfg.evaluator, OmegaConf.to_container(cfg.metrics), rank(), world(), device(),
        prepare=lambda: ensure(recipe, cfg.model.path, cfg.paths.work),
        load=lambda: instantiate(cfg.model).to(device()),
        build=lambda options: build(complete(cfg, options), run.backbone),
        method=lambda: build(cfg.method, run.backbone),
    )  # fmt: skip
    options = OmegaConf.to_container(cfg.study, resolve=True)
    if "rows" in options:
        options["rows"] = {name: row_facts(name, node) for name, node in cfg.study.rows.items()}
    if "sweep" in options:
        options["sweep"] = row_facts("sweep", cfg.study.sweep) or None
        for facts in (*options["rows"].values(), options["sweep"]):
            check_places((facts or {}).get("options", {}))
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
            study(cfg, inputs).write_inputs(inputs)
            print(inputs)
        return
    folder = run_folder(cfg)
    measurement = study(cfg, folder)
    report = measurement.measure()
    if rank() > 0:
        return
    facts = report.facts | {"wall_time_s": round(time.monotonic() - start, 1)}
    write_json(folder / "provenance.json", provenance(cfg, **facts))
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    page = write_page(folder, f"{cfg.name} {folder.name}", report.text, config, report.rows, facts["count"])
    log(cfg, measurement.run, report, page)
    write_json(folder / "metrics.json", report.figures)
    print(f"\n{report.text}")
    print(folder, page, *report.pictures, sep="\n")


def number(cell: str) -> float | None:
    """A cell of table.csv; None for an empty one."""
    return float(cell) if cell else None


def list_artifacts(cfg: DictConfig, run: "StudyRun", report: Report) -> list[Artifact]:
    """What the figures were made of, for W&B: the manifest if any, and the networks of all rows that lie here."""
    from harmony.models.shipped import list_weights

    nodes = {**cfg.study.get("rows", {}), "sweep": cfg.study.get("sweep")}
    rows = [options for name, node in nodes.items() if (options := row_facts(name, node).get("options"))]
    networks: dict[str, Path] = {}
    for options in rows or [cfg.method]:
        networks |= list_weights(options)
    manifests = [run.manifest] if "manifest" in report.facts else []
    artifacts = [Artifact(cfg.dataset.name, "dataset", {path.name: path}) for path in manifests]
    return artifacts + [Artifact(name, "model", {"": folder}) for name, folder in networks.items()]


def log(cfg: DictConfig, run: "StudyRun", report: Report, page: Path) -> None:
    """The same to W&B, where that is the logger: the figures, their table, pictures, and what they were made of.

    Figures are pictures of their own beside the table of samples, the pictures of which an older W&B does not send.
    """
    logger = build_logger(cfg, "evaluate")
    if not hasattr(logger, "log_table"):
        return
    logger.log_metrics(report.figures)
    if (run.folder / "table.csv").exists():
        with open(run.folder / "table.csv", newline="") as file:
            head, *rows = csv.reader(file)
        log_table(logger, "table", head, [[name, *map(number, cells)] for name, *cells in rows])
    for picture in report.pictures:
        logger.log_image(picture.stem, [str(picture)])
    log_page(logger, page)
    log_samples(logger, report.rows, report.samples)
    log_artifacts(logger, list_artifacts(cfg, run, report), [])
    logger.experiment.finish()


if __name__ == "__main__":
    main()
