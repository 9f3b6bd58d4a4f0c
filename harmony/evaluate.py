"""F6. ``python -m harmony.evaluate controlnet=RUN dataset=NAME`` or ``experiment=table1``: figures on held-out data.

Without an experiment: one trained ControlNet, before (weight 0) and after. An experiment with a ``study`` compares
methods on the same pictures, holes and noise; finished pictures are not made again by the same command, and
``torchrun --nproc-per-node N -m harmony.evaluate`` shares them out among processes.
"""

import os
import time
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harmony.config import entry, provenance, rank, run_folder
from harmony.data.manifest import manifest_hash
from harmony.data.preparation import ensure
from harmony.errors import UserError
from harmony.files import write_json, write_text

EXAMPLES = 8  # pictures on a study's figure
CURVES = ("raw/fid", "pasted/fpsnr", "pasted/color_de", "pasted/edge_f1")
CHOICE = "pasted/fpsnr"  # what the best lambda is best in, on validation


def before_after(cfg: DictConfig, kit, manifest: Path, folder: Path) -> tuple[dict, dict, str, Path]:
    """(figures, facts, table, picture) of one ControlNet."""
    from harmony.images import grid, write_image
    from harmony.models.controlnet import load_controlnet, read_hint
    from harmony.sampling.benchmark import before_and_after, load_bench, reconstruct, table
    from harmony.sampling.harmonize import Branch, Settings

    facts = {"branch": "color", "parameters": {}} | read_hint(cfg.controlnet)
    branch = Branch(facts["branch"], load_controlnet(cfg.controlnet), cfg.weight, facts["parameters"])
    protocol = {key: cfg[key] for key in ("split", "limit", "steps", "guidance", "seed")}
    metrics, measured = before_and_after(kit, manifest, [branch], **protocol)
    shown = load_bench(manifest, cfg.split, kit.resolution, 16)
    settings = Settings(cfg.steps, cfg.guidance, cfg.seed)
    columns = [reconstruct(kit, shown, branches, settings) for branches in ([], [branch])]
    rows = [
        [e.image * ~e.hole[..., None], off, on, e.image] for e, off, on in zip(shown.examples, *columns, strict=True)
    ]
    picture = folder / "grids" / "samples.png"
    picture.parent.mkdir(exist_ok=True)
    write_image(picture, grid(rows, ["input", "hint off", "output", "truth"]))
    text = f"{table(metrics, cfg.split, **measured)}\n"
    write_text(folder / "table.md", text)
    return metrics, measured, text, picture


class Study:
    """One study: its benches, its methods, their stored outputs, the table and the figure."""

    def __init__(self, cfg: DictConfig, kit, manifest: Path, folder: Path):
        from harmony.sampling.benchmark import feature_extractor
        from harmony.sampling.harmonize import Settings

        self.cfg, self.kit, self.manifest, self.folder = cfg, kit, manifest, folder
        self.study = OmegaConf.to_container(cfg.study, resolve=True)
        self.settings = Settings(cfg.steps, cfg.guidance, cfg.seed)
        self.extractor = feature_extractor(kit)
        self.branches, self.notes = {}, []
        self.rank, self.world = rank(), int(os.environ.get("WORLD_SIZE") or 1)

    def bench(self, split: str):
        from harmony.sampling.benchmark import load_bench, relight_bench

        at = self.manifest, split, self.kit.resolution, self.cfg.limit
        match self.study["bench"]:
            case "reconstruct":
                return load_bench(*at)
            case "relight":
                return relight_bench(*at, radius=self.study["radius"])
        raise UserError(f"study.bench={self.study['bench']}: choose reconstruct or relight")

    def branch(self, name: str):
        """The ControlNet that ``controlnets`` calls ``name``, loaded once."""
        from harmony.sampling.harmonize import load_branch

        if name not in self.cfg.controlnets:
            raise UserError(f"there is no controlnets.{name}; there are: {', '.join(self.cfg.controlnets)}")
        if name not in self.branches:
            every = dict.fromkeys(("color", "structure", "raw"), 1.0)
            self.branches[name] = load_branch(self.cfg.controlnets[name], self.kit, every)
        return self.branches[name]

    def weighted(self, name: str, weights: dict[str, float]):
        """The method that runs the ControlNets with these weights."""
        from harmony.sampling.study import diffusion, weighted

        branches = weighted({net: self.branch(net) for net in weights}, weights)
        return diffusion(name, self.kit, branches, self.settings)

    def sweep(self, names=("color", "structure")):
        """Method for each lambda, or for each pair of them as ``structure color``."""
        lambdas = self.study["lambdas"]
        if self.study["pairs"] == "same":
            return [self.weighted(f"{v:g}", dict.fromkeys(names, v)) for v in lambdas]
        low, high = names
        return [self.weighted(f"{h:g} {v:g}", {low: v, high: h}) for h in lambdas for v in lambdas]

    def best(self, name: str, nets: list[str]):
        """The method at the lambda that is best on the validation split; the test split has no say."""
        from harmony.sampling.benchmark import figures
        from harmony.sampling.study import outputs, run

        bench, folder = self.bench("validation"), self.folder / "outputs" / f"choice {name}"
        methods = self.sweep(nets)
        run(bench, methods, folder, self.rank, self.world)
        found = {m.name: figures(bench, outputs(bench, m, folder), self.extractor) for m in methods}
        chosen = max(found, key=lambda lam: found[lam][f"validation/{CHOICE}"])
        self.notes.append(f"{name}: lambda {chosen} of {', '.join(found)}, best on validation in {CHOICE}")
        return self.weighted(name, dict.fromkeys(nets, float(chosen)))

    def methods(self) -> list:
        from harmony.sampling.study import baseline

        listed = [] if self.study["methods"] else self.sweep()
        for name, node in self.study["methods"].items():
            if node is None:
                self.notes.append(f"{name}: not measured yet")
            elif "baseline" in node:
                listed.append(baseline(node["baseline"], name))
            elif "best" in node:
                listed.append(self.best(name, node["best"]))
            else:
                listed.append(self.weighted(name, node))
        return listed

    def measure(self) -> tuple[dict, dict, str, Path]:
        """(figures, facts, table, picture); on other ranks than the first the share of outputs alone is made."""
        from harmony.sampling.benchmark import degraded, figures
        from harmony.sampling.study import outputs, run
        from harmony.sampling.tables import write_table

        whole = self.bench(self.cfg.split)
        protocol = f"DDIM {self.cfg.steps} steps, guidance {self.cfg.guidance:g}, seed {self.cfg.seed}"
        line = f"{self.cfg.name}: n = {len(whole)} {self.cfg.split} pictures of {self.manifest.parent.name}, {protocol}"
        if self.rank == 0:
            print(line, flush=True)
        methods, table, shown = self.methods(), {}, {}
        for factor in self.study["degrade"]:
            bench = whole if factor == 1 else degraded(whole, factor)
            folder = self.folder / "outputs" / f"x{factor}"
            run(bench, methods, folder, self.rank, self.world)
            if self.rank > 0:
                continue
            for method in methods:
                row = method.name if len(self.study["degrade"]) == 1 else f"{method.name} x{factor}"
                shown[row] = outputs(bench, method, folder)
                table[row] = figures(bench, shown[row], self.extractor)
        if self.rank > 0:
            return {}, {}, "", self.folder
        for row, printed in self.study["paper"].items():
            table.setdefault(row, {}).update({f"paper/{metric}": value for metric, value in printed.items()})
        facts = {"protocol": self.extractor.protocol, "count": len(whole)}
        notes = [f"{line}; fid and kid on {self.extractor.protocol} features", *self.notes]
        first = "lambda" if self.study["lambdas"] and not self.study["methods"] else "method"
        text = write_table(self.folder, table, first, notes)
        picture = self.figure(whole, table, shown)
        flat = {f"{row}/{name}": value for row, numbers in table.items() for name, value in numbers.items()}
        return flat, facts, text, picture

    def figure(self, bench, table: dict, shown: dict) -> Path:
        """``figure.png``; curves and heat maps have the pictures beside them in ``pictures.png``."""
        import numpy as np

        from harmony.sampling.benchmark import pasted, spread
        from harmony.sampling.tables import curves, heat, pictures

        few = spread(list(range(len(bench))), EXAMPLES)
        part, lambdas = bench.part(few), self.study["lambdas"]
        columns = {row: pasted(part, [images[i] for i in few]) for row, images in shown.items()}
        given = [np.where(e.hole[..., None], 0, b) for e, b in zip(part.examples, part.seen(), strict=True)]
        target = self.folder / "figure.png"
        beside = target if self.study["figure"] == "pictures" else self.folder / "pictures.png"
        if self.study["figure"] == "heat":
            squares = [[columns[f"{h:g} {v:g}"][0] for v in lambdas] for h in reversed(lambdas)]
            pictures(beside, squares, [f"colour {v:g}" for v in lambdas])
            metrics = [f"{bench.name}/{metric}" for metric in CURVES]
            values = {m: np.array([[table[f"{h:g} {v:g}"][m] for v in lambdas] for h in lambdas]) for m in metrics}
            heat(target, values, lambdas, lambdas, ("lambda_l (colour)", "lambda_h (structure)"))
        else:
            rows = list(zip(given, part.given(), *columns.values(), part.truths(), strict=True))
            pictures(beside, rows, ["input", "instance", *columns, "truth"])
        if self.study["figure"] == "curves":
            curves(target, table, [f"{bench.name}/{metric}" for metric in CURVES], "lambda")
        return target


@entry("evaluate")
def main(cfg: DictConfig) -> None:
    """Figures, table and picture of one ControlNet or of a study."""
    began = time.monotonic()
    folder = run_folder(cfg)
    manifest = ensure(OmegaConf.to_container(cfg.dataset, resolve=True), cfg.model.path, cfg.paths.work)
    kit = instantiate(cfg.model)
    if cfg.study.bench is None:
        metrics, measured, text, picture = before_after(cfg, kit, manifest, folder)
    else:
        metrics, measured, text, picture = Study(cfg, kit, manifest, folder).measure()
    if rank() > 0:
        return
    facts = provenance(
        cfg, **measured, wall_time_s=round(time.monotonic() - began, 1), manifest=manifest_hash(manifest)
    )
    write_json(folder / "provenance.json", facts)
    log(cfg, folder, metrics, picture)
    write_json(folder / "metrics.json", metrics)
    print(f"\n{text}")
    print(folder)
    print(picture)


def log(cfg: DictConfig, folder: Path, metrics: dict, picture: Path) -> None:
    """The same to W&B, where that is the logger: the table as a table, the figure as a picture."""
    logger = instantiate(cfg.logger)
    if not hasattr(logger, "log_table"):
        return
    import csv

    logger.log_metrics(metrics)
    if (folder / "table.csv").exists():
        with open(folder / "table.csv", newline="") as file:
            head, *rows = csv.reader(file)
        logger.log_table("table", columns=head, data=rows)
    logger.log_image("figure", [str(picture)])
    logger.experiment.finish()


if __name__ == "__main__":
    main()
