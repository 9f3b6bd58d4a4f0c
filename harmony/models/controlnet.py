"""ControlNets for an inpainting UNet, in the class and format of diffusers.

The input is only the noisy latent (``conv_in`` keeps the first C of the UNet's 2C + 1 input channels), as in eq. 6 of
Liu 2025. It is also the only form that the stock ``StableDiffusionControlNetInpaintPipeline`` runs.
"""

import inspect
import math
import os
import shutil
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from harmony.core.errors import UserError
from harmony.core.files import replace_file, replace_folder, write_json
from harmony.core.foreign import read_json
from harmony.models.backbone import Backbone
from harmony.models.shipped import CONTROLNET, fetch_weights, find_weights
from harmony.models.weights import load_network
from harmony.pixels.hints import HINTS
from harmony.pixels.images import sha256

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = ("config.json", "hint.json", WEIGHTS)  # of a ControlNet; hint.json may be missing
HINT_CHANNELS = (16, 32, 96, 256)  # widths of the hint encoder's layers; each layer after the first halves the side
SILU_GAIN = 1.68  # 1 / the root mean square of SiLU of a unit normal


def from_unet(unet: UNet2DConditionModel, factor: int, in_channels: int | None = 4) -> ControlNetModel:
    """A trainable copy of the UNet's encoder and middle block with zero-initialized outputs and hint encoder output.

    ``factor`` is the VAE's factor, by which the hint encoder must shrink the hint. ``in_channels=None`` keeps all input
    channels of the UNet (an ablation). The residuals are exactly zero before training.

    The hint encoder's inner convolutions are initialized so that they keep the variance of their input. PyTorch's
    default divides it by about three in each layer: after seven layers the hint has 1/400 of its size, below biases
    forty times as large, and a short training ends before the hint has an effect.
    """
    widths = HINT_CHANNELS[: int(math.log2(factor)) + 1]
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)
    if in_channels is not None and in_channels != net.config.in_channels:
        state = net.state_dict()
        state["conv_in.weight"] = state["conv_in.weight"][:, :in_channels].clone()
        net = ControlNetModel.from_config({**net.config, "in_channels": in_channels})
        net.load_state_dict(state)
    hint_encoder = net.controlnet_cond_embedding
    for convolution in (hint_encoder.conv_in, *hint_encoder.blocks):
        torch.nn.init.normal_(convolution.weight, std=SILU_GAIN / convolution.weight[0].numel() ** 0.5)
        torch.nn.init.zeros_(convolution.bias)
    net = net.to(unet.device)
    return (net if net.dtype == torch.float32 else net.float()).requires_grad_(True).train()


def zero_convolutions(net: ControlNetModel) -> list[torch.nn.Parameter]:
    """Parameters of the 1 x 1 output convolutions, one for each skip and one for the middle block."""
    return [*net.controlnet_down_blocks.parameters(), *net.controlnet_mid_block.parameters()]


def net_hash(path: str | os.PathLike) -> str:
    """sha256 of a ControlNet's weight files; the id of a ControlNet on the hub."""
    folder = find_weights(CONTROLNET, path)
    return "+".join(sha256(file) for file in sorted(folder.glob("*.safetensors"))) if folder else str(path)


def load_controlnet(path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> ControlNetModel:
    """Load a frozen ControlNet from whatever ``fetch_weights`` knows. Never unpickles."""
    try:
        source = fetch_weights(CONTROLNET, path)
        net = load_network(ControlNetModel, source, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"cannot load a ControlNet from {path}: {str(error).splitlines()[0]}") from error
    return net.requires_grad_(False).eval()


def read_hint(path: str | os.PathLike) -> dict:
    """Read ``hint.json`` beside the weights: branch, operator parameters, backbone; empty if there is no such file."""
    folder = find_weights(CONTROLNET, path)
    if folder is None or not (folder / "hint.json").exists():
        return {}
    try:
        facts = read_json(folder / "hint.json")
        check_parameters(facts["branch"], to_cells(facts["parameters"]))
        if type(facts.get("cell", 8)) is not int or not 1 <= facts.get("cell", 8) <= 64:
            raise ValueError(f"cell={facts['cell']!r} is no number of pixels")
        return {"backbone": facts.get("kit"), **facts}  # the key of version 0.1
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder}/hint.json is damaged ({error}): export the ControlNet again") from None


def to_cells(parameters: dict, side: int = 64) -> dict:
    """A hint's parameters, with lengths in latent cells; in version 0.1 ``sigma`` was in pixels at a side of 512.

    ``side``: cells of a latent's side.
    """
    if "sigma" not in parameters:
        return parameters
    sigma, rest = parameters["sigma"], {name: value for name, value in parameters.items() if name != "sigma"}
    if type(sigma) not in (int, float) or not 0 <= sigma <= 512 or "blur" in rest:
        raise ValueError(f"the color hint takes no sigma={sigma!r}")
    return {"blur": sigma * side / 512, **rest}


RANGES = {"blur": (0, 64), "low": (0, 10_000), "high": (0, 10_000)}  # of a hint's numbers, which files may bring


def check_parameters(branch: str, parameters: dict) -> None:
    """Raise ValueError unless ``branch`` exists and ``parameters`` are values that its operator takes."""
    if branch not in HINTS:
        raise ValueError(f"branch {branch!r} is none of {', '.join(HINTS)}")
    defaults = {name: p.default for name, p in inspect.signature(HINTS[branch]).parameters.items()}
    defaults = {name: value for name, value in defaults.items() if name not in ("image", "mask", "cell")}
    defaults["surroundings"] = False
    for name, value in parameters.items():
        low, high = RANGES.get(name, (0, 0))
        number = name in RANGES and type(value) in (int, float) and low <= value <= high
        if name not in defaults or not (number or (name not in RANGES and type(value) is type(defaults[name]))):
            raise ValueError(f"the {branch} hint takes no {name}={value!r}")


def export_controlnet(net: ControlNetModel, folder: Path, branch: str, parameters: dict, backbone: Backbone) -> Path:
    """Write ``folder/controlnet`` in diffusers layout; ``hint.json`` beside the weights describes its hint.

    The same files stand at the top of ``folder``.
    """
    target, hashes = Path(folder) / "controlnet", {part: backbone.hash(part) for part in ("vae", "unet")}
    facts = {"branch": branch, "parameters": parameters, "cell": backbone.factor, "backbone": backbone.name, **hashes}
    with replace_folder(target) as temp_folder:
        net.save_pretrained(temp_folder)
        write_json(temp_folder / "hint.json", facts)
    link_to_top(target)
    return target


def link_to_top(controlnet: Path) -> None:
    """Put the files of the folder ``controlnet`` into the folder above it too, where hubs and diffusers look for them.

    They are links where the disk has links, so that weights take their space once.
    """
    for name in FILES:
        if not (controlnet / name).exists():
            (controlnet.parent / name).unlink(missing_ok=True)
            continue
        with replace_file(controlnet.parent / name) as temp_path:
            try:
                os.link(controlnet / name, temp_path)
            except OSError:
                shutil.copyfile(controlnet / name, temp_path)
