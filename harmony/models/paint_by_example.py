"""Paint by Example's networks: the exemplar encoder, and the UNet that is conditioned on its output (Yang 2022).

Channel order and mask polarity differ from Stable Diffusion inpainting: latent, masked latent, *keep* mask. Only
``join_condition`` converts from the one to the other.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from transformers import CLIPVisionConfig, CLIPVisionModel

from harmony.core.errors import UserError
from harmony.core.files import replace_folder, write_json, write_tensors
from harmony.models.backbone import Backbone, load_part, weights_hash
from harmony.models.shipped import CLIP_TOWER, PAINTER, fetch_weights, find_weights
from harmony.models.weights import fill_network, load_network, read_weights
from harmony.pixels.images import sha256, to_clip

WEIGHTS = "model.safetensors"
LAYERS_A_BLOCK = 5  # the mapper has (layers of the tower + 1) // 5 blocks


class Mapper(torch.nn.Module):
    """Pre-norm transformer blocks with one head."""

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            BasicTransformerBlock(width, 1, width, activation_fn="gelu", attention_bias=True) for _ in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class ExemplarEncoder(torch.nn.Module):
    """The exemplar encoder: exemplars B x 3 x S x S in [0, 1] -> context B x T x D, with T = 1 as a bottleneck.

    CLIP's vision tower (``model``, frozen), mapper, layer norm, projection to the UNet's width D, and the learned
    ``uncond_vector`` 1 x 1 x D for no exemplar. Keys are those of diffusers' PaintByExampleImageEncoder.

    ``all_tokens`` (an ablation) keeps the patch tokens too: T = 1 + patches, and the exemplar's layout is transmitted.
    """

    def __init__(self, config: CLIPVisionConfig, all_tokens: bool = False):
        super().__init__()
        self.config, self.all_tokens = config, all_tokens
        self.model = CLIPVisionModel(config).requires_grad_(False).eval()
        self.mapper = Mapper(config.hidden_size, (config.num_hidden_layers + 1) // LAYERS_A_BLOCK)
        self.final_layer_norm = torch.nn.LayerNorm(config.hidden_size)
        self.proj_out = torch.nn.Linear(config.hidden_size, config.projection_dim)
        self.uncond_vector = torch.nn.Parameter(torch.randn(1, 1, config.projection_dim))

    @property
    def size(self) -> int:
        """Side S of an exemplar in pixels."""
        return self.config.image_size

    def train(self, mode: bool = True) -> "ExemplarEncoder":
        """Set the training mode, except for the tower, which stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    def trainable_parameters(self) -> Iterator[torch.nn.Parameter]:
        """All parameters except those of the tower."""
        return (p for name, p in self.named_parameters() if not name.startswith("model."))

    @torch.no_grad()
    def features(self, exemplars: torch.Tensor) -> torch.Tensor:
        """The features B x T x width of the frozen tower."""
        output = self.model(pixel_values=to_clip(exemplars).to(self.uncond_vector.dtype))
        if self.all_tokens:
            return self.model.post_layernorm(output.last_hidden_state)
        return output.pooler_output[:, None]

    def forward(self, exemplars: torch.Tensor) -> torch.Tensor:
        return self.proj_out(self.final_layer_norm(self.mapper(self.features(exemplars))))


def join_condition(hole: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Join [masked latent, keep mask] B x (C + 1) x h x w from the hole B x 1 x h x w (1 = paint) and masked latent."""
    return torch.cat([masked, 1 - hole], 1)


# ---------------------------------------------------------------------------------------------------- building


def build_encoder(tower: CLIPVisionModel, width: int, all_tokens: bool = False) -> ExemplarEncoder:
    """Build an encoder from a CLIP vision tower with untrained layers after it; ``width`` is the UNet's D.

    A projection of the tower is left out.
    """
    config = CLIPVisionConfig(**{**tower.config.to_dict(), "projection_dim": width})
    encoder = ExemplarEncoder(config, all_tokens)
    state = tower.state_dict()
    encoder.model.load_state_dict(tower_keys(state, "vision_model.") or state)
    return encoder


def load_tower(path: str) -> CLIPVisionModel:
    """Load a frozen CLIP vision tower from a folder or hub id. UserError if there is none; never unpickles."""
    try:
        source = fetch_weights(CLIP_TOWER, path)
        return load_network(CLIPVisionModel, source, use_safetensors=True).requires_grad_(False).eval()
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"module.tower={path} is no CLIP vision tower: {str(error).splitlines()[0]}") from error


def tower_keys(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries whose keys start with ``prefix``, which is removed."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def build_painting_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Build a trainable float32 copy of a UNet whose input is latent, masked latent, keep mask.

    From nine channels (inpainting: latent, hole, masked latent) the slices are reordered. A hole is 1 - keep, so its
    slice changes sign and its sum is added to the bias: the same network, except at the picture's rim, where the
    convolution's zero padding means a keep mask of 0. From four channels the five new slices are zero: before training
    the network ignores masked latent and mask, as in Paint by Example.
    """
    c = unet.config.out_channels
    if unet.config.in_channels not in (c, 2 * c + 1):
        raise UserError(f"a UNet with {unet.config.in_channels} input channels can begin no Paint by Example")
    state = {name: value.detach().float().clone() for name, value in unet.state_dict().items()}
    kernel = state["conv_in.weight"]
    if unet.config.in_channels == c:
        zeros = kernel.new_zeros(len(kernel), c + 1, *kernel.shape[2:])
        state["conv_in.weight"] = torch.cat([kernel, zeros], 1)
    else:
        latent, hole, masked = kernel.split([c, 1, c], 1)
        state["conv_in.weight"] = torch.cat([latent, masked, -hole], 1)
        state["conv_in.bias"] = state["conv_in.bias"] + hole.sum((1, 2, 3))
    copy = UNet2DConditionModel.from_config({**unet.config, "in_channels": 2 * c + 1})
    copy.load_state_dict(state)
    return copy.requires_grad_(True).train()


# ---------------------------------------------------------------------------------------------------- files


@dataclass
class Painter:
    """A loaded Paint by Example: ``backbone`` with the painting UNet instead of its own, and the encoder."""

    backbone: Backbone
    encoder: ExemplarEncoder


def load_painter(path: str | os.PathLike, backbone: Backbone) -> Painter:
    """Load a frozen Paint by Example from a run, a shipped name, a diffusers folder or a hub id. Never unpickles.

    A folder with a VAE (released weights) is its own backbone; otherwise VAE and schedule are those of ``backbone``, on
    which it was trained.
    """
    folder = find_weights(PAINTER, path)
    source = str(folder or path)
    has_backbone = folder is None or (folder / "vae").is_dir()
    unet = load_part(source, "unet", dtype=backbone.dtype)
    if has_backbone:
        backbone = Backbone(source, dtype=backbone.dtype, device=backbone.device)
    elif (
        unet.config.out_channels != backbone.channels
        or unet.config.sample_size * backbone.factor != backbone.resolution
    ):
        raise UserError(f"{path} does not fit backbone {backbone.name}: give the model.path that it was trained on")
    elif (facts := backbone_facts(folder)).get("vae", backbone.hash("vae")) != backbone.hash("vae"):
        raise UserError(
            f"{path} was trained on another VAE than that of backbone {backbone.name}: model.path={facts['backbone']}"
        )
    encoder = read_encoder(source, backbone).to(backbone.device, backbone.dtype)
    if encoder.config.projection_dim != unet.config.cross_attention_dim:
        raise UserError(f"{path}: the encoder's width {encoder.config.projection_dim} is not the UNet's")
    return Painter(backbone.with_unet(unet), encoder)


def painter_hash(path: str | os.PathLike) -> str:
    """sha256 over the weight files of a Paint by Example; the id of one on the hub."""
    folder = find_weights(PAINTER, path)
    return "+".join(sha256(file) for file in sorted(folder.glob("*/*.safetensors"))) if folder else str(path)


def backbone_facts(folder: Path) -> dict:
    """Name and VAE hash of the backbone that a Paint by Example was trained on; empty for foreign files."""
    file = folder / "backbone.json"
    if not file.exists():
        file = folder / "kit.json"  # the file name of version 0.1
    try:
        facts = json.loads(file.read_text()) if file.exists() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): export the run again") from None
    if not isinstance(facts, dict):
        raise UserError(f"{file} is damaged (a {type(facts).__name__}): export the run again")
    return {"backbone": facts.get("kit"), **facts} if facts else facts


def backbone_tower(backbone: Backbone, config: CLIPVisionConfig) -> CLIPVisionModel:
    """The backbone's vision tower in float32. UserError if its architecture is not ``config``."""
    tower = CLIPVisionModel(config).requires_grad_(False).eval()
    state = tower_keys(load_part(backbone.path, "image_encoder").state_dict(), "vision_model.")
    try:
        tower.load_state_dict(state)
    except RuntimeError:
        raise UserError(
            f"the CLIP tower of backbone {backbone.name} is of another architecture: give that of its training"
        ) from None
    return tower


def fetch_encoder_file(source: str, name: str) -> Path:
    """The path of a file of the encoder in a folder; a file on the hub is fetched."""
    if os.path.isdir(source):
        return Path(source) / "image_encoder" / name
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, f"image_encoder/{name}"))


def read_encoder(source: str, backbone: Backbone) -> ExemplarEncoder:
    """Read the frozen encoder in ``source/image_encoder``; released files use older names for the tower's weights.

    Files without a tower get the tower of ``backbone``, if they were trained with it.
    """
    try:
        config = json.loads(fetch_encoder_file(source, "config.json").read_text())
        encoder = ExemplarEncoder(CLIPVisionConfig(**config), config.get("all_tokens", False))
        file = fetch_encoder_file(source, WEIGHTS)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"cannot load image_encoder of {source}: {str(error).splitlines()[0]}") from error
    state = {name.replace("model.vision_model.", "model.", 1): value for name, value in read_weights(file).items()}
    state.pop("model.embeddings.position_ids", None)  # a constant in older files
    if not any(name.startswith("model.") for name in state):
        tower = backbone_tower(backbone, encoder.config)
        if weights_hash(tower) != backbone_facts(Path(source)).get("tower"):
            raise UserError(
                f"{source} was trained with another CLIP tower than that of {backbone.name}: give its model.path"
            )
        state |= {f"model.{name}": value for name, value in tower.state_dict().items()}
    fill_network(encoder, state, file)
    return encoder.requires_grad_(False).eval()


def export_painter(
    unet: UNet2DConditionModel,
    encoder: ExemplarEncoder,
    folder: Path,
    backbone: Backbone,
    half: bool = False,
    tower: bool = True,
) -> Path:
    """Write ``folder/paint_by_example``: ``unet`` and ``image_encoder`` in diffusers layout, and ``backbone.json``.

    ``half``: weights in float16. ``tower=False`` leaves out CLIP's tower, which must then be that of the
    backbone; diffusers cannot load such an export, harmony can.
    """
    target = Path(folder) / "paint_by_example"
    facts = {"backbone": backbone.name, "vae": backbone.hash("vae"), "tower": weights_hash(encoder.model)}
    if not tower and facts["tower"] != weights_hash(backbone_tower(backbone, encoder.config)):
        raise UserError(f"its CLIP tower is not that of backbone {backbone.name}, so it cannot be left out: tower=true")
    dtype = torch.float16 if half else torch.float32
    copy = UNet2DConditionModel.from_config(unet.config)
    copy.load_state_dict({name: value.detach().cpu() for name, value in unet.state_dict().items()})
    torch.nn.Module.to(copy, dtype)  # diffusers' own ``to`` warns about modules to keep in float32
    config = encoder.config.to_dict() | {"architectures": ["PaintByExampleImageEncoder"]}
    config |= {"all_tokens": True} if encoder.all_tokens else {}
    state = {name: value for name, value in encoder.state_dict().items() if tower or not name.startswith("model.")}
    state = {name: value.to(dtype) for name, value in state.items()}
    with replace_folder(target) as temp_folder:
        copy.save_pretrained(temp_folder / "unet")
        write_json(temp_folder / "image_encoder" / "config.json", config)
        write_tensors(temp_folder / "image_encoder" / WEIGHTS, state, {"format": "pt"})
        write_json(temp_folder / "backbone.json", facts)
    return target
