"""``python -m harmony.bench train sample``: ours against the common way, side by side on this machine.

train     one ControlNet from cached latents, against the loop of the common training script
joint     two ControlNets in one run, against two runs of that loop
sample    inpainting with two ControlNets, exact and near-exact, against diffusers' stock pipeline
data      selection over annotations of Open Images' size, against pandas; import into FiftyOne, against its importer
memory    of a training step, for batches of 1 to 64
gpu       everything that a GPU changes, within six minutes: tests, every command, and the figures above at true size
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from harmony.cli.command import entry
from harmony.cli.provenance import provenance
from harmony.cli.run_folder import new_folder
from harmony.core.errors import UserError
from harmony.core.files import write_json, write_text
from harmony.core.progress import tell

if TYPE_CHECKING:
    from harmony.models.backbone import Backbone

Figures = dict[str, dict[str, float]]  # what was measured -> figure -> number


def train(
    cfg: DictConfig, backbone: "Backbone", branches: tuple[str, ...] = ("color",), what: str = "train"
) -> Figures:
    from harmony.benchmarks.train import Load, bench_train

    load = Load(cfg.batch, cfg.steps, cfg.blocks, cfg.compile, cfg.checkpointing, cfg.offload)
    return {what: bench_train(backbone, load, branches)}


def joint(cfg: DictConfig, backbone: "Backbone") -> Figures:
    return train(cfg, backbone, ("color", "structure"), "joint")


def sample(cfg: DictConfig, backbone: "Backbone") -> Figures:
    from harmony.benchmarks.sample import bench_sample

    s = cfg.sampling
    return bench_sample(backbone, s.batch, s.steps, s.guidance, cfg.blocks, s.modes)


def data(cfg: DictConfig, backbone: "Backbone") -> Figures:
    from harmony.benchmarks.data import bench_import, bench_selection

    folder, d = Path(cfg.paths.work).resolve() / "bench", cfg.data
    selection = bench_selection(folder, d.boxes, d.masks, cfg.blocks)
    return {"data": selection, "data_import": bench_import(folder, d.samples, d.compared, cfg.blocks)}


def memory(cfg: DictConfig, backbone: "Backbone") -> Figures:
    from harmony.benchmarks.memory import bench_memory

    return {"memory": bench_memory(backbone)}


PARTS: dict[str, Callable[[DictConfig, object], Figures]] = {
    "train": train,
    "joint": joint,
    "sample": sample,
    "data": data,
    "memory": memory,
}


def measure(part: str, cfg: DictConfig, backbone: "Backbone") -> Figures:
    """The figures of one part."""
    tell(f"\n{part}: backbone {backbone.name} on {backbone.device.type}")
    figures = PARTS[part](cfg, backbone)
    torch._dynamo.reset()  # a compiled step of another task is another one
    torch.cuda.empty_cache()
    return figures


def table(figures: Figures) -> str:
    """Markdown: what has a ratio, with its rate beside the reference's."""
    lines = ["| | ours, a second | reference | ratio | lowest | highest | TFLOP/s | of the peak |", "|---" * 8 + "|"]
    for what, f in figures.items():
        if "ratio" in f:
            ratios = (f"{f[name]:.2f}" for name in ("ratio", "ratio_min", "ratio_max"))
            rates = " | ".join([f"{f['ours']:.3g}", f"{f['reference']:.3g}", *ratios])
            share = f"{f['tflops']:.3g} | {100 * f['share_of_peak']:.0f} %" if "tflops" in f else "- | -"
            lines.append(f"| {what} | {rates} | {share} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def words(overrides: list[str]) -> list[str]:
    """The command line for Hydra: bare words are what to measure."""
    bare = [word for word in overrides if word.isidentifier()]
    return [*(word for word in overrides if word not in bare), *([f"what=[{','.join(bare)}]"] if bare else [])]


def check(cfg: DictConfig, device: str) -> None:
    """UserError for what cannot be measured on this ``device``."""
    from harmony.benchmarks.sample import list_modes

    if wrong := [what for what in cfg.what if what not in (*PARTS, "gpu")]:
        raise UserError(f"{wrong[0]} cannot be measured: choose among {', '.join(PARTS)}, gpu")
    if "gpu" in cfg.what and len(cfg.what) > 1:
        raise UserError("gpu measures the other parts itself: give it alone")
    if wrong := [name for name in cfg.sampling.modes or () if name not in list_modes(device)]:
        raise UserError(f"sampling.modes={wrong[0]}: choose among {', '.join(list_modes(device))}")


def measure_gpu(cfg: DictConfig, folder: Path, gpu: bool) -> None:
    """All parts of ``benchmarks.gpu`` as processes of their own; what is left is their table."""
    from harmony.benchmarks.gpu import list_parts, run_parts

    beside = max(1, min(6, (os.cpu_count() or 1) // 2)) if gpu else 1
    outcomes = run_parts(list_parts(folder), folder, gpu, beside, cfg.limit)
    if skipped := [o.name for o in outcomes if o.status.startswith("skipped")]:
        print(f"skipped, since there is no GPU: {', '.join(skipped)}")
    print(f"\n{(folder / 'table.md').read_text()}\n{folder / 'parts.json'}")


@entry("bench", read=words)
def main(cfg: DictConfig) -> None:
    """Measure what is asked for and write ``bench.json``: <what>/<backbone>/<device>/<figure>."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    check(cfg, where)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = new_folder(Path(cfg.paths.runs).resolve() / "bench")
    write_json(folder / "provenance.json", provenance(cfg))
    if "gpu" in cfg.what:
        return measure_gpu(cfg, folder, where == "cuda")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    backbone, figures = instantiate(cfg.model).to(where), {}
    for part in cfg.what:
        figures |= measure(part, cfg, backbone)
        # written after each part: what fails or is stopped loses nothing that was measured before
        flat = {
            f"{what}/{backbone.name}/{backbone.device.type}/{k}": v for what, f in figures.items() for k, v in f.items()
        }
        write_json(folder / "bench.json", flat)
        write_text(folder / "table.md", table(figures) + "\n")
    print(f"\n{table(figures)}\n\n{folder / 'bench.json'}")


if __name__ == "__main__":
    main()
