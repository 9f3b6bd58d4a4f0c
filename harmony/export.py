"""``python -m harmony.export RUN``: write what a run trained for other tools, with a model card.

``format=diffusers`` makes a folder whose ``controlnet/`` the stock StableDiffusionControlNetInpaintPipeline loads, with
the same output as ours; ``format=comfyui`` makes one file for ComfyUI's models/controlnet, under a name of its own.
"""

from pathlib import Path

<<<<<<< HEAD
import torch
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
=======
from omegaconf import DictConfig
>>>>>>> export

from harmony.cli.config import entry, literal, make_folder
from harmony.core.errors import UserError
<<<<<<< HEAD
from harmony.core.files import write_tensors, write_text
from harmony.models.backbone import kit_path, ship
from harmony.models.controlnet import controlnet_folder, export_controlnet, from_unet, read_hint
from harmony.models.paint_by_example import Painter, export_painter, load_painter
=======
from harmony.training.export import write_backbone, write_controlnet, write_painter, write_single_file
from harmony.training.run_folder import RunFolder, find_run
>>>>>>> export

FORMATS = ("diffusers", "comfyui")


def overrides(words: list[str]) -> list[str]:
    """The command line for Hydra: the word without ``=`` is the run, and paths are text."""
    pairs = [word if "=" in word or word.startswith("~") else f"run={word}" for word in words]
    return [literal(word, ("run", "kit", "output", "license")) for word in pairs]


def output_folder(cfg: DictConfig, path: Path, run: RunFolder) -> Path:
    """Where to write: ``output``, or the run's own ``export/``, or the folder in there that ``path`` names.

<<<<<<< HEAD

def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def export_checkpoint(run: Path, output: Path) -> Path:
    """``output/controlnet`` from the last checkpoint of a run that has not ended."""
    cfg, last = load_yaml(run / "config.yaml"), run / "checkpoints" / "last.ckpt"
    branch = OmegaConf.select(cfg, "module.branch")
    if branch is None:
        raise UserError(f"{run} trained no ControlNet; its results lie where the run's config.yaml says")
    if not isinstance(branch, str):
        raise UserError(f"{run} trains several ControlNets and has not ended: its end writes each into {run}/export")
    try:
        saved = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    except Exception as error:  # pickle, zip and torch each have their own
        kind = type(error).__name__
        raise UserError(f"cannot read {last} ({kind}): continue the run, its next checkpoint replaces it") from None
    kit = instantiate(cfg.model)
    net = from_unet(kit.unet, kit.factor, cfg.module.in_channels)
    try:
        net.load_state_dict({name.removeprefix("net."): value for name, value in saved.items()})
    except RuntimeError:
        raise UserError(f"{last} does not fit kit {kit.name}: the kit has changed since the training began") from None
    parameters = OmegaConf.to_container(cfg.data.hints, resolve=True).get(branch, {})
    return export_controlnet(net, output, branch, parameters, kit)


def export_folder(path: Path, output: Path) -> Path:
    """``output/controlnet``: the export of a run that has ended is copied, otherwise its last checkpoint is written."""
    target = output / "controlnet"
    if (path / "checkpoints" / "last.ckpt").exists() and not (path / "metrics.json").exists():
        return export_checkpoint(path, output)
    source = controlnet_folder(path)
    if source.resolve() != target.resolve():
        partial = output / ".controlnet.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    return target


def halve(controlnet: Path) -> None:
    """Rewrite the weights in float16, as all shipped weights are; what loads them asks for its own precision."""
    with safe_open(controlnet / WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name).half() for name in file.keys()}  # noqa: SIM118
    write_tensors(controlnet / WEIGHTS, tensors, {"format": "pt"})


def copy_grid(run: Path, output: Path) -> Path | None:
    """The last sample grid of a run as ``output/grid.png``; None where there is none."""
    grids = sorted((run / "grids").glob("*.png"))
    if grids:
        shutil.copyfile(grids[-1], output / ".grid.png")
        os.replace(output / ".grid.png", output / "grid.png")
    return output / "grid.png" if (output / "grid.png").exists() else None


def kit_licence(kit: str) -> str:
    """The licence that the card of a local kit states, ``unknown`` where there is none."""
    card = Path(kit_path(kit)) / "README.md"
    return (metadata_load(card) or {}).get("license", "unknown") if card.is_file() else "unknown"


def training_text(run: Path, facts: dict) -> str:
    """How it was trained: command, data, steps, versions, kit."""
    cfg = load_yaml(run / "config.yaml") if (run / "config.yaml").exists() else OmegaConf.create({})
    told = read_json(run / "provenance.json")
    lines = [f"- kit: `{facts.get('kit', 'unknown')}`"]
    lines += [f"- sha256 of the kit's {part}: `{facts[part]}`" for part in ("unet", "vae") if part in facts]
    if told.get("command"):
        lines.insert(0, f"```bash\npython -m harmony.fit {shlex.join(told['command'][1:])}\n```\n")
    if OmegaConf.select(cfg, "dataset.name"):
        manifest = f", manifest sha256 `{told['manifest']}`" if told.get("manifest") else ""
        lines.append(f"- data: `{cfg.dataset.name}`{manifest}")
    if OmegaConf.select(cfg, "trainer.max_steps"):
        lines.append(f"- {cfg.trainer.max_steps} steps, {cfg.data.batch_size} pictures a process, seed {cfg.seed}")
    if told:
        commit = told.get("git", {}).get("commit", "unknown")
        library, seconds = told["versions"]["torch"], told.get("wall_time_s", "?")
        lines.append(f"- {told['device']}, {seconds} s, torch {library}, commit `{commit}`")
    return "\n".join(lines)


def figures_text(run: Path, without: str = "without the ControlNet") -> str:
    """Final figures beside those of the baseline, and the protocol they were measured by."""
    numbers = read_json(run / "metrics.json")
    rows = [name for name in sorted(numbers) if f"baseline/{name}" in numbers]
    if not rows:
        return "None were measured."
    told, e = read_json(run / "provenance.json"), load_yaml(run / "config.yaml").evaluate
    count = told.get("count", e.limit or "all")
    features = f", fid and kid on {told['protocol']}" if told.get("protocol") else ""
    lines = [
        f"Reconstruction of {count} held-out pictures ({e.split}): DDIM, {e.steps} steps, guidance {e.guidance}, "
        f"seed {e.seed}{features}. `raw` is the model's output, `pasted` that after the hole is pasted back.",
        "",
        f"| metric | {without} | with it |",
        "|---|---|---|",
    ]
    return "\n".join(lines + [f"| {name} | {numbers[f'baseline/{name}']:.4g} | {numbers[name]:.4g} |" for name in rows])


def model_card(run: Path, facts: dict, grid: Path | None, licence: str) -> str:
    """The text of ``README.md``; ``facts`` are those of ``hint.json``."""
    branch, kit = facts.get("branch", "unknown"), facts.get("kit", "unknown")
    head = ModelCardData(
        license=licence,
        library_name="diffusers",
        base_model=None if os.path.isdir(kit_path(kit)) else kit,  # a hub id; a local kit has no page to link to
        tags=["controlnet", "inpainting", "image-harmonization"],
    )
    arguments = "".join(f", {name}={value!r}" for name, value in facts.get("parameters", {}).items())
    body = CARD.format(
        title=f"harmony {branch}: a ControlNet for image harmonization",
        branch=branch,
        kit=kit,
        keeps={"color": "colour", "structure": "shape and texture"}.get(branch, "appearance"),
        sees=SEES.get(branch, "Unknown"),
        arguments=arguments,
        model="" if kit == "tiny" else f" model.path={kit}",
        grid="\n![input, hint, without the ControlNet, with it, truth](grid.png)\n" if grid else "",
        snippet=SNIPPET.format(kit=kit),
        training=training_text(run, facts),
        figures=figures_text(run),
        licence=f"`{licence}`, that of the kit's weights, from which this network was copied before it was trained.",
    )
    return f"---\n{head.to_yaml()}\n---\n{body}"


def for_diffusers(all_tokens: bool, tower: bool) -> str:
    """Whether diffusers can read the encoder."""
    if all_tokens:
        return "diffusers' PaintByExampleImageEncoder would read it, but takes the class token alone: use harmony."
    if not tower:
        return "CLIP's tower is not among the weights: harmony takes the kit's, diffusers cannot load the encoder so."
    return "diffusers' PaintByExampleImageEncoder reads the encoder."


def painter_card(run: Path, painter: Painter, facts: dict, grid: Path | None, licence: str, tower: bool) -> str:
    """The text of ``README.md`` of a Paint by Example; ``facts`` are those of ``kit.json``."""
    kit = facts.get("kit", "unknown")
    head = ModelCardData(license=licence, library_name="diffusers", tags=["inpainting", "paint-by-example"])
    body = PAINTER_CARD.format(
        title="harmony Paint by Example",
        kit=kit,
        tokens="all tokens" if painter.encoder.all_tokens else "one token",
        grid="\n![input, exemplar, without it, with it, truth](grid.png)\n" if grid else "",
        model="" if kit == "tiny" else f" model.path={kit}",
        diffusers=for_diffusers(painter.encoder.all_tokens, tower),
        training=training_text(run, facts),
        figures=figures_text(run, "without an exemplar"),
        licence=f"`{licence}`, that of the kit's weights, from which this network was copied before it was trained.",
    )
    return f"---\n{head.to_yaml()}\n---\n{body}"


def write_painter(run: Path, output: Path, licence: str | None, half: bool, tower: bool) -> Path:
    """Export the Paint by Example of ``run`` into the folder ``output``."""
    cfg = load_yaml(run / "config.yaml")
    if not (run / "metrics.json").exists():
        raise UserError(f"{run} has not ended: the command of its training goes on with it")
    painter = load_painter(run, instantiate(cfg.model, dtype="float32"))  # the weights as they were trained
    folder = export_painter(painter.kit.unet, painter.encoder, output, painter.kit, half, tower)
    facts = read_json(folder / "kit.json")
    licence = licence or kit_licence(facts["kit"])
    write_text(output / "README.md", painter_card(run, painter, facts, copy_grid(run, output), licence, tower))
    return output


def single_file(controlnet: Path, target: Path, facts: dict) -> Path:
    """The weights in one file, with diffusers' own keys; hint and configuration in its metadata."""
    with safe_open(controlnet / WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = (controlnet / "config.json").read_text()
    write_tensors(target, tensors, {"format": "pt", "config": config, "hint": json.dumps(facts)})
    return target


def write(kind: str, path: Path, run: Path, output: Path, licence: str | None, half: bool = False) -> Path:
    """Export the ControlNet in ``path``, which belongs to ``run``, as ``kind``: the folder ``output``, or one file."""
    if kind == "comfyui":
        with TemporaryDirectory(dir=output) as scratch:
            controlnet = export_folder(path, Path(scratch))
            if half:
                halve(controlnet)
            facts = read_hint(controlnet)
            return single_file(controlnet, output / f"harmony-{facts.get('branch', 'controlnet')}.safetensors", facts)
    controlnet = export_folder(path, output)
    if half:
        halve(controlnet)
    facts = read_hint(controlnet)
    card = model_card(run, facts, copy_grid(run, output), licence or kit_licence(facts.get("kit", "unknown")))
    write_text(output / "README.md", card)
    return output


def trains_painter(run: Path) -> bool:
    file = run / "config.yaml"
    return file.exists() and str(OmegaConf.select(load_yaml(file), "module._target_")).endswith("ExemplarTask")


KIT_PARTS = ("vae", "clip", "captioner", "inpaint")
KIT_CARD = """---
license: apache-2.0
library_name: diffusers
---
# {name}

A small Stable-Diffusion-like inpainting kit in diffusers layout, trained from nothing by the project `harmony`: VAE,
CLIP (text and vision tower), BLIP captioner and a nine-channel inpainting UNet (latent, mask, masked latent; with a
full hole a text-to-image model). For first runs, tests and studies on a CPU, not for pictures to hang on a wall.

Made by `make kit`: {commands}.

Trained on {data}.

| figure on held-out pictures | value |
|---|---|
{figures}

Licence: weights Apache-2.0. The photographs are not part of the project; their sources allow training (see
`datasets/kit/README.md`).

{pictures}"""


def newest_run(runs: Path, name: str) -> Path:
    """The newest finished run of an experiment. UserError when there is none."""
    done = sorted(path.parent for path in (runs / name).glob("*/metrics.json"))
    if not done:
        raise UserError(f"{runs / name} has no finished run: train it with python -m harmony.fit experiment={name}")
    return done[-1]


def export_kit(source: Path, output: Path, runs: Path) -> Path:
    """Ship the kit in ``source``: float16 weights, and a card with the figures and grids of its trainings."""
    found = {part: newest_run(runs, f"kit_{part}") for part in KIT_PARTS}
    sizes = ship(source, output)
    figures, pictures = [], []
    for part, run in found.items():
        numbers = json.loads((run / "metrics.json").read_text())
        figures += [f"| {part}: {key} | {value:.4g} |" for key, value in sorted(numbers.items()) if "validation" in key]
        for grid in sorted((run / "grids").glob("*.png"))[-1:]:
            shutil.copyfile(grid, output / f"{part}.png")
            pictures.append(f"![{part}]({part}.png)")
    figures += [f"| size of {part}, MB | {size / 1e6:.2f} |" for part, size in sizes.items()]
    recipe = OmegaConf.load(found["inpaint"] / "config.yaml").dataset
    photographs = "no photographs" if recipe.photos is None else f"photographs of {', '.join(recipe.sources)}"
    commands = ", ".join(f"`python -m harmony.fit experiment=kit_{part}`" for part in KIT_PARTS)
    card = KIT_CARD.format(
        name=output.name,
        commands=commands,
        data=f"the train split of {512 + recipe.count} studio scenes under two lights each and {photographs}",
        figures="\n".join(figures),
        pictures="\n".join(pictures),
    )
    write_text(output / "README.md", card + "\n")
    return output


@entry("export", read=overrides)
def main(cfg: DictConfig) -> None:
    """Write what a run trained in diffusers' or ComfyUI's format, or a trained kit in float16."""
    if cfg.kit is not None:
        if cfg.output is None:
            raise UserError("export kit=FOLDER needs output=FOLDER: where the kit is to be written")
        print(export_kit(Path(cfg.kit), make_folder(cfg.output), Path(cfg.paths.runs)))
        return
=======
    UserError where there is no such place, and where the run's own weights would change.
    """
    own = run.path / "export"
    if cfg.output is not None:
        output = Path(cfg.output).resolve()
    elif not run.config:
        raise UserError(f"{path} belongs to no run; add output=FOLDER")
    else:
        place = path.parent if path.name == "controlnet" else path
        output = place if place.is_relative_to(own) else own
        if output.exists():
            run.check(output)
    if (cfg.half or not cfg.tower) and output.is_relative_to(own):
        raise UserError("half=true and tower=false would change the run's own weights: add output=FOLDER")
    return output


def export_run(cfg: DictConfig) -> Path:
    """Write what ``cfg.run`` trained; the path of the result."""
>>>>>>> export
    if cfg.run is None:
        raise UserError("what shall be exported? python -m harmony.export RUN, or kit=FOLDER output=FOLDER")
    if cfg.format not in FORMATS:
        raise UserError(f"format={cfg.format}: choose one of {', '.join(FORMATS)}")
    path = Path(cfg.run)
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a run folder, runs/<experiment>/<time>")
    path, run = path.resolve(), find_run(path)
    paints = run.task == "ExemplarTask"
    if paints and cfg.format != "diffusers":
        raise UserError(f"format={cfg.format} is for ControlNets; Paint by Example has its own nodes: leave it out")
    output = make_folder(output_folder(cfg, path, run))
    if paints:
        return write_painter(run, output, cfg.license, cfg.half, cfg.tower)
    if cfg.format == "comfyui":
        return write_single_file(run, path, output, cfg.half)
    return write_controlnet(run, path, output, cfg.license, cfg.half)


def export_backbone(cfg: DictConfig) -> Path:
    """Write the trained backbone ``cfg.kit`` in float16; the path of the result."""
    if cfg.output is None:
        raise UserError("export kit=FOLDER needs output=FOLDER: where the backbone is to be written")
    return write_backbone(Path(cfg.kit), make_folder(cfg.output), Path(cfg.paths.runs))


@entry("export", read=overrides)
def main(cfg: DictConfig) -> None:
    """Write what a run trained in the format of diffusers or ComfyUI, or a trained backbone in float16."""
    print(export_run(cfg) if cfg.kit is None else export_backbone(cfg))


if __name__ == "__main__":
    main()
