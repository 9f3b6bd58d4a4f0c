"""F6. ``python -m harmony.evaluate controlnet=RUN dataset=NAME``: a trained ControlNet on held-out pictures."""

import time
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harmony.config import entry, provenance, run_folder
from harmony.data.manifest import manifest_hash
from harmony.data.preparation import ensure
from harmony.files import write_json, write_text


@entry("evaluate")
def main(cfg: DictConfig) -> None:
    """Figures of the reconstruction benchmark, without and with the ControlNet, and the grid to look at."""
    from harmony.images import grid, write_image
    from harmony.models.controlnet import load_controlnet, read_hint
    from harmony.sampling.benchmark import before_and_after, load_bench, reconstruct, table
    from harmony.sampling.harmonize import Branch, Settings

    began = time.monotonic()
    folder = run_folder(cfg)
    manifest = ensure(OmegaConf.to_container(cfg.dataset, resolve=True), cfg.model.path, cfg.paths.work)
    kit = instantiate(cfg.model)
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
    (folder / "grids").mkdir(exist_ok=True)
    write_image(folder / "grids" / "samples.png", grid(rows, ["input", "hint off", "output", "truth"]))
    text = f"{table(metrics, cfg.split, **measured)}\n"
    write_text(folder / "table.md", text)
    facts = provenance(
        cfg, **measured, wall_time_s=round(time.monotonic() - began, 1), manifest=manifest_hash(manifest)
    )
    write_json(folder / "provenance.json", facts)
    write_json(folder / "metrics.json", metrics)
    print(f"\n{text}")
    print(folder)
    print(Path(folder) / "grids" / "samples.png")


if __name__ == "__main__":
    main()
