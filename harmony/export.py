"""``python -m harmony.export RUN``: write what a run trained for other tools, with a model card.

``format=diffusers`` makes a folder that DiffusionPipeline loads as a HarmonyPipeline, one call for a photograph of any
size, and whose weights the stock StableDiffusionControlNetInpaintPipeline loads, both with the same output as ours;
``format=comfyui`` makes one file for the models/controlnet of ComfyUI, which knows the sizes of sd1 and sd2 alone.
"""

from pathlib import Path

from omegaconf import DictConfig

from harmony.cli.command import entry, literal
from harmony.cli.run_folder import make_folder
from harmony.core.errors import UserError
from harmony.core.hub import check_repository, upload_files
from harmony.models.shipped import find_asset
from harmony.training.export import (
    ITS_TRAINING,
    PUBLISHED,
    check_output,
    write_backbone,
    write_controlnet,
    write_painter,
    write_single_file,
)
from harmony.training.run_folder import RunFolder, find_run


def overrides(words: list[str]) -> list[str]:
    """The command line for Hydra: the word without ``=`` is the run, and paths are text."""
    pairs = [word if "=" in word or word.startswith("~") else f"run={word}" for word in words]
    return [literal(word, ("run", "backbone", "output", "license", "push")) for word in pairs]


def output_folder(cfg: DictConfig, path: Path, run: RunFolder) -> Path:
    """Where to write: ``output``, or the run's own ``export/``, or the folder in there that ``path`` names.

    UserError where there is no such place, and where the run's own weights would change.
    """
    weights = run.path / "export"
    if cfg.output is not None:
        output = Path(cfg.output).resolve()
    elif not run.config:
        raise UserError(f"{path} belongs to no run; add output=FOLDER")
    else:
        place = path.parent if path.name == "controlnet" else path
        output = place if place.is_relative_to(weights) else weights
        if output.exists():
            run.check(output)
    is_other = cfg.half or not cfg.tower or (cfg.checkpoint is not None and run.has_ended)
    if is_other and output.is_relative_to(weights):
        raise UserError("half=true, tower=false and checkpoint= would change the run's own weights: add output=FOLDER")
    if is_other and not run.config and output in (path, path.parent):
        raise UserError(f"{output} holds the weights that are read: give another output=FOLDER")
    check_output(output)
    return output


def export_run(cfg: DictConfig) -> Path:
    """Write what ``cfg.run`` trained; the path of the result."""
    if cfg.run is None:
        raise UserError("what shall be exported? python -m harmony.export RUN, or backbone=FOLDER output=FOLDER")
    path = find_asset(cfg.run) or Path(cfg.run)
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a run folder, runs/<experiment>/<time>, or a shipped name")
    path, run = path.resolve(), find_run(path)
    paints = run.task == "ExemplarTask"
    if paints and cfg.format != "diffusers":
        raise UserError(f"format={cfg.format} is for ControlNets; Paint by Example has its own nodes: leave it out")
    if paints and cfg.checkpoint is not None:
        raise UserError(f"checkpoint={cfg.checkpoint} is for ControlNets; networks of Paint by Example: {ITS_TRAINING}")
    if cfg.checkpoint is not None and not run.config:
        raise UserError(f"{path} belongs to no run: leave out checkpoint={cfg.checkpoint}")
    output = make_folder(output_folder(cfg, path, run))
    if paints:
        return write_painter(run, output, cfg.license, cfg.half, cfg.tower)
    if cfg.format == "comfyui":
        return write_single_file(run, path, output, cfg.half, cfg.checkpoint)
    return write_controlnet(run, path, output, cfg.license, cfg.half, cfg.checkpoint, cfg.push)


def export_backbone(cfg: DictConfig) -> Path:
    """Write the trained backbone ``cfg.backbone`` in float16; the path of the result."""
    if cfg.output is None:
        raise UserError("export backbone=FOLDER needs output=FOLDER: where the backbone is to be written")
    if cfg.push is not None:
        raise UserError(f"push={cfg.push} is for runs: leave it out, and upload a backbone by hf upload")
    return write_backbone(Path(cfg.backbone), make_folder(cfg.output), Path(cfg.paths.runs))


@entry("export", read=overrides)
def main(cfg: DictConfig) -> None:
    """Write what a run trained in the format of diffusers or ComfyUI, or a trained backbone in float16."""
    if cfg.push is not None:
        check_repository(cfg.push)
    path = export_run(cfg) if cfg.backbone is None else export_backbone(cfg)
    if cfg.push is not None:
        folder, files = (path.parent, (path.name,)) if path.is_file() else (path, PUBLISHED)
        print(f"uploaded to {upload_files(folder, files, cfg.push)}")
    print(path)


if __name__ == "__main__":
    main()
