"""Exports the networks of a run for other tools: folders for diffusers, a file for ComfyUI, a backbone to ship.

Results are written into a scratch folder inside ``output`` and then moved into place, completely or not at all. Reading
follows the rules of ``run_folder``: plain values and regular files of the run.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from diffusers import __version__
from safetensors.torch import save_file

from harmony.core.errors import UserError
from harmony.core.files import make_scratch, write_json, write_text
from harmony.core.foreign import read_json
from harmony.data.latent_data import only_set
from harmony.models.backbone import GEOMETRY, ship
from harmony.models.controlnet import (
    FILES,
    WEIGHTS,
    export_controlnet,
    from_unet,
    link_to_top,
    load_controlnet,
    read_hint,
    to_cells,
)
from harmony.models.paint_by_example import backbone_facts, export_painter, load_painter
from harmony.models.shipped import CONTROLNET, PAINTER, find_weights
from harmony.models.weights import read_weights
from harmony.pixels.hints import HINTS
from harmony.training.bundle import bundle
from harmony.training.cards import (
    read_fact,
    read_license,
    render_backbone_card,
    render_controlnet_card,
    render_painter_card,
)
from harmony.training.checkpoints import KINDS, Facts, find_checkpoint, read_checkpoint, read_facts, restore
from harmony.training.run_folder import RunFolder

ITS_TRAINING = "the command of its training exports them, with resume=RUN checkpoint=best those of the best checkpoint"
BACKBONE_PARTS = ("vae", "clip", "captioner", "inpaint")  # in the order of their trainings
PUBLISHED = (*FILES, "README.md", "grid.png", "model_index.json", "pipeline.py", "controlnet/*", "paint_by_example/*")
PIPELINE_TITLE = """HarmonyPipeline, at the end of this file: the ControlNets of an export in one call of diffusers.

Written by harmony's export from its own code; harmony itself need not be installed.
"""
COMFYUI_KNOWS = ("sd1", "sd2")  # backbones; its list of UNets is fixed, and its ControlNets read 4 channels
COMFYUI_HINTS = {"conditioning_embedding_out_channels": [16, 32, 96, 256], "conditioning_channels": 3}
UNET_SIZES = (
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "cross_attention_dim",
    "attention_head_dim",
    "use_linear_projection",
)
RENDERS = 512  # bundled studio scenes, beside those that a training renders


# --- files


@contextmanager
def open_scratch(output: Path) -> Iterator[Path]:
    """A temporary folder in ``output``; after an error an empty ``output`` is removed too."""
    try:
        with make_scratch(output / "export") as folder:
            yield folder
    except BaseException:
        with suppress(OSError):  # it is not empty
            output.rmdir()
        raise


def copy_file(source: Path, target: Path, folder: Path) -> None:
    """Copy a file to ``target`` atomically, by way of the scratch ``folder``."""
    os.replace(shutil.copyfile(source, folder / target.name), target)


def check_output(output: Path) -> None:
    """UserError for a folder that holds something else than an export, of which a file would be overwritten."""
    kinds = {"model_index.json": "HarmonyPipeline", "config.json": "ControlNetModel"}
    for name, kind in kinds.items():
        if (file := output / name).exists():
            facts = read_json(file)
            if not isinstance(facts, dict) or kind not in np.atleast_1d(facts.get("_class_name")):
                raise UserError(f"{file} is not of an export: give output=FOLDER, a folder of its own")
    code = output / "pipeline.py"
    if code.exists() and PIPELINE_TITLE.splitlines()[0] not in code.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{code} is not of an export: give output=FOLDER, a folder of its own")


def has_grid(run: RunFolder, output: Path) -> bool:
    """Whether ``output`` will have a sample grid, that of the run or an earlier one."""
    return run.grid is not None or (output / "grid.png").is_file()


def publish(run: RunFolder, networks: Path, card: str, output: Path) -> None:
    """Move the scratch folder ``networks`` into ``output``, with the card and the run's last sample grid."""
    target = output / networks.name
    if target.exists() or target.is_symlink():
        os.replace(target, networks.with_name("before"))  # removed with the scratch folder
    os.replace(networks, target)
    if run.grid:
        copy_file(run.grid, output / "grid.png", networks.parent)
    write_text(output / "README.md", card)


# --- ControlNets


def read_branch(run: RunFolder) -> str:
    """The branch of a run that trains one ControlNet. UserError for other runs."""
    if run.task == "JointTask":
        raise UserError(f"{run.path} trains several ControlNets at once: {ITS_TRAINING}")
    branch = run.read_option("module.branch")
    if branch not in HINTS:
        raise UserError(f"{run.path}/config.yaml: module.branch is {branch}, not one of {', '.join(HINTS)}")
    return branch


def choose_checkpoint(run: RunFolder, kind: str | None) -> str | None:
    """The kind of checkpoint to export; None: what the run has exported already, or what is no run."""
    if kind is not None or run.has_ended or not (run.path / "checkpoints").is_dir():
        return kind
    kind = run.read_option("checkpoint") or "last"
    if kind not in KINDS:
        raise UserError(f"{run.path}/config.yaml: checkpoint is {kind}, not one of {', '.join(KINDS)}")
    return kind


def restore_controlnet(run: RunFolder, output: Path, kind: str) -> tuple[Path, Facts]:
    """Write ``output/controlnet`` from a checkpoint of the run; its folder and the facts of the checkpoint."""
    branch, path = read_branch(run), find_checkpoint(run, kind)
    content, backbone = read_checkpoint(path), run.load_backbone()
    net = from_unet(backbone.unet, backbone.factor, run.read_option("module.in_channels", int))
    restore(torch.nn.ModuleDict({"net": net}), content, path, f"backbone {backbone.name}")
    parameters = only_set(run.read_option(f"data.hints.{branch}", dict) or {})
    parameters = to_cells(parameters, backbone.resolution // backbone.factor)
    return export_controlnet(net, output, branch, parameters, backbone), read_facts(kind, content, path)


def copy_controlnet(run: RunFolder, path: Path, output: Path) -> Path:
    """Copy the ControlNet at ``path`` in the run to ``output/controlnet``."""
    source, target = find_weights(CONTROLNET, path), output / "controlnet"
    for name in FILES:
        run.find_file(source.relative_to(run.path) / name)  # no link is followed
    load_controlnet(source)  # what nobody can load is not handed on
    facts = read_hint(source)
    target.mkdir()
    for name in FILES:
        file = run.find_file(source.relative_to(run.path) / name)
        if file is None and name != "hint.json":
            raise UserError(f"{source} has no {name}: give a run folder or a diffusers folder")
        if file is not None:
            shutil.copyfile(file, target / name)
    if facts and "cell" not in facts and run.config:  # of version 0.1: cards and scripts count in latent cells
        backbone = run.load_backbone()
        parameters = to_cells(facts["parameters"], backbone.resolution // backbone.factor)
        write_json(target / "hint.json", facts | {"parameters": parameters, "cell": backbone.factor})
    return target


def write_networks(
    run: RunFolder, path: Path, output: Path, half: bool, checkpoint: str | None
) -> tuple[Path, Facts | None]:
    """Write ``output/controlnet`` from a checkpoint of the run, or from its export; its folder, what it is of.

    ``half``: weights in float16, as everything that is shipped; loaders convert them to their own precision.
    """
    kind = choose_checkpoint(run, checkpoint)
    if kind is None:
        controlnet, facts = copy_controlnet(run, path, output), run.checkpoint
    else:
        controlnet, facts = restore_controlnet(run, output, kind)
    if half:
        tensors = {name: tensor.half() for name, tensor in read_weights(controlnet / WEIGHTS).items()}
        # to another file first: tensors that were in half precision already are still mapped to this one
        save_file(tensors, output / "half.safetensors", metadata={"format": "pt"})
        os.replace(output / "half.safetensors", controlnet / WEIGHTS)
    return controlnet, facts


def write_controlnet(
    run: RunFolder,
    path: Path,
    output: Path,
    license: str | None,
    half: bool,
    checkpoint: str | None,
    home: str | None = None,
) -> Path:
    """Write the folder ``output`` for diffusers: weights, ``HarmonyPipeline``, a model card, the last sample grid.

    ``home``: the repository on a hub where the card will be read; None: in the folder.
    """
    with open_scratch(output) as folder:
        controlnet, facts = write_networks(run, path, folder, half, checkpoint)
        hint = read_hint(controlnet)
        license = license or read_license(read_fact(hint, "backbone"))
        if hint and home is not None:  # on a hub nobody is to read where a backbone lies here
            name = read_fact(hint, "backbone")
            hint |= {"backbone": Path(name).name if os.path.isabs(name) else name}
            write_json(controlnet / "hint.json", hint)
        card = render_controlnet_card(run, hint, has_grid(run, output), license, facts, home)
        (output / "model_index.json").unlink(missing_ok=True)  # written last: what diffusers loads is of one export
        publish(run, controlnet, card, output)
    link_to_top(output / "controlnet")
    write_pipeline(output, hint)
    return output


def write_pipeline(output: Path, hint: Facts) -> None:
    """Write what makes diffusers load ``output`` as a ``HarmonyPipeline``; nothing where the hint is unknown."""
    index, code = output / "model_index.json", output / "pipeline.py"
    if not hint:
        index.unlink(missing_ok=True)
        code.unlink(missing_ok=True)
        return
    write_text(code, bundle("harmony.training.pipeline", "HarmonyPipeline", PIPELINE_TITLE))
    facts = {
        "_class_name": ["pipeline", "HarmonyPipeline"],
        "_diffusers_version": __version__,
        "controlnet": ["diffusers", "ControlNetModel"],
        "backbone": read_fact(hint, "backbone"),
        "hints": {"controlnet": {name: hint[name] for name in ("branch", "parameters")}},
    }
    write_json(index, facts)


def check_comfyui(controlnet: Facts) -> None:
    """UserError for the configuration of a ControlNet that ComfyUI cannot load, or would load as another network.

    ComfyUI looks the shapes of the weights up in a fixed list (``unet_config_from_diffusers_unet``) and builds the
    network of the list, whose attention heads and hint encoder are none of the shapes that it compares.
    """
    differences = []
    for name in COMFYUI_KNOWS:
        unet = {"use_linear_projection": False} | read_json(GEOMETRY / name / "unet" / "config.json")
        known = {key: unet[key] for key in UNET_SIZES} | COMFYUI_HINTS | {"in_channels": 4}
        differences.append([key for key, value in known.items() if controlnet.get(key) != value])
    nearest = min(differences, key=len)
    if nearest:
        raise UserError(
            f"format=comfyui: ComfyUI loads ControlNets of {' and '.join(COMFYUI_KNOWS)}, this one has another "
            f"{', '.join(nearest)}: leave out format=comfyui, or train it with model=sd2"
        )


def write_single_file(run: RunFolder, path: Path, output: Path, half: bool, checkpoint: str | None) -> Path:
    """Write one file for ComfyUI with the keys of diffusers, and hint and configuration in its metadata."""
    with open_scratch(output) as folder:
        controlnet, _ = write_networks(run, path, folder, half, checkpoint)
        check_comfyui(read_json(controlnet / "config.json"))
        facts = read_hint(controlnet)
        target = output / f"harmony-{facts.get('branch', 'controlnet')}.safetensors"
        texts = {"format": "pt", "config": (controlnet / "config.json").read_text(), "hint": json.dumps(facts)}
        save_file(read_weights(controlnet / WEIGHTS), folder / target.name, metadata=texts)
        os.replace(folder / target.name, target)
    return target


# --- Paint by Example


def write_painter(run: RunFolder, output: Path, license: str | None, half: bool, tower: bool) -> Path:
    """Write the folder ``output``: ``paint_by_example/``, a model card, the last sample grid."""
    with open_scratch(output) as folder:
        if not run.has_ended:
            raise UserError(f"{run.path} has not ended: continue it with the command of its training")
        run.check_all(find_weights(PAINTER, run.path))
        painter = load_painter(run.path, run.load_backbone())
        networks = export_painter(painter.backbone.unet, painter.encoder, folder, painter.backbone, half, tower)
        all_tokens, grid = painter.encoder.all_tokens, has_grid(run, output)
        card = render_painter_card(run, backbone_facts(networks), all_tokens, tower, grid, license)
        publish(run, networks, card, output)
    return output


# --- backbones


def find_newest_run(runs: Path, experiment: str) -> RunFolder:
    """The newest run of an experiment that has ended. UserError where there is none."""
    folders = sorted(path.parent for path in (runs / experiment).glob("*/metrics.json"))
    if not folders:
        command = f"python -m harmony.fit experiment={experiment}"
        raise UserError(f"{runs / experiment} has no run that has ended: train it with {command}")
    return RunFolder(folders[-1].resolve())


def write_backbone(source: Path, output: Path, runs: Path) -> Path:
    """Write the trained backbone in ``source`` with float16 weights and a card of the figures and grids of its runs."""
    own = f"backbone_{source.resolve().name}"
    family = own if (runs / f"{own}_{BACKBONE_PARTS[-1]}").is_dir() else "backbone"
    trainings = {part: find_newest_run(runs, f"{family}_{part}") for part in BACKBONE_PARTS}
    for run in trainings.values():
        if (trained := run.read_option("module.backbone")) and Path(trained).name != source.resolve().name:
            raise UserError(f"{run.path} trained {trained}, not {source}: give paths.runs=FOLDER with its trainings")
    sizes = ship(source, output)
    figures, pictures = [], []
    with open_scratch(output) as folder:
        for part, run in trainings.items():
            figures += [(f"{part}: {key}", value) for key, value in sorted(run.metrics.items()) if "validation" in key]
            if run.grid:
                copy_file(run.grid, output / f"{part}.png", folder)
                pictures.append(part)
    figures += [(f"size of {part}, MB", size / 1e6) for part, size in sizes.items()]
    last = trainings["inpaint"]
    photographs, sources = last.read_option("dataset.photos"), last.read_option("dataset.sources", list)
    card = render_backbone_card(
        output.name,
        [f"{family}_{part}" for part in trainings],
        (RENDERS if last.read_option("dataset.dir") else 0) + (last.read_option("dataset.count", int) or 0),
        "no photographs" if photographs is None else f"photographs of {', '.join(map(str, sources or []))}",
        figures,
        pictures,
    )
    write_text(output / "README.md", card)
    return output
