"""A backbone: a folder in diffusers layout, its parts and its properties.

No other code depends on which backbone it runs on: latent factor, channels, resolution, prediction type and latent
scale come from the backbone's configuration files. Latents are multiplied by the VAE's scaling factor, hints are in [0,
1], images in [-1, 1].
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from harmony.core.errors import UserError
from harmony.core.files import replace_folder, write_json
from harmony.core.hub import fetch_folder
from harmony.models.shipped import ASSETS, backbone_path
from harmony.models.weights import load_network

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import (
        BlipForConditionalGeneration,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionModelWithProjection,
        ProcessorMixin,
    )

GEOMETRY = (
    ASSETS / "geometry"
)  # configurations of the true sizes, without weights, as diffusers and transformers read them
DIFFUSION = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")  # the parts that sampling and training need
CLASSES = {
    "vae": ("diffusers", "AutoencoderKL"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "DDIMScheduler"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "text_tower": ("transformers", "CLIPTextModelWithProjection"),  # the text encoder with its CLIP projection
    "captioner": ("transformers", "BlipForConditionalGeneration"),
    "processor": ("transformers", "AutoProcessor"),  # of the captioner
}
FOLDERS = {"text_tower": "text_encoder", "processor": "captioner"}  # the folder of every other part has the part's name
WEIGHTLESS_PARTS = ("tokenizer", "scheduler", "processor")
REMEDY = "fetch it on a machine with a network and give model.path=FOLDER, or use model.weights=random"
STEP_PARTS = ("unet", "text_encoder")  # the parts that run in every step of training and sampling
# Attention kernels for a GPU; with native PyTorch chooses.
ATTENTION = {"native": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
attention_preference = ExitStack()  # holds the kernel preference of this process
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_part(path: str, part: str, weights: str = "hub", dtype: torch.dtype = torch.float32) -> Any:
    """Load one part of a backbone, frozen and in eval mode.

    ``weights="random"`` builds the architecture from the backbone's configuration without reading weights. Raises
    UserError if the part does not exist.
    """
    import importlib

    library, name = CLASSES[part]
    cls = getattr(importlib.import_module(library), name)
    folder = FOLDERS.get(part, part)
    part_folder = (
        os.path.join(path, folder)
        if os.path.isdir(path)
        else str(fetch_folder(path, folder, REMEDY, weights != "random"))
    )
    if not os.path.isdir(part_folder):
        raise UserError(f"backbone {path} has no {part}: make backbone trains one, or give another model.path")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if part in WEIGHTLESS_PARTS:
                options = {"trust_remote_code": False} if name.startswith("Auto") else {}
                return cls.from_pretrained(part_folder, **options)
            if weights == "random":
                if library == "diffusers":
                    model = cls.from_config(cls.load_config(part_folder))
                    torch.nn.Module.to(model, dtype)  # diffusers' own ``to`` warns about modules to keep in float32
                else:
                    model = cls(cls.config_class.from_pretrained(part_folder)).to(dtype)
            else:
                options = {"torch_dtype": dtype} if library == "diffusers" else {"dtype": dtype}
                model = load_network(cls, part_folder, use_safetensors=True, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"cannot load {part} of backbone {path}: {str(error).splitlines()[0]}") from error
    forget_path(model)
    return model.requires_grad_(False).eval()


def forget_path(model: torch.nn.Module) -> None:
    """Remove the path of this machine from the configuration that is saved with ``model``."""
    if hasattr(model, "register_to_config"):  # diffusers
        model.register_to_config(_name_or_path="")
    else:
        model.config._name_or_path = ""


def memory_format(device: torch.device) -> torch.memory_format:
    """The memory format of convolution weights on ``device``: channels last on a GPU, for its tensor cores.

    On a CPU the format makes no difference (measured).
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def move_module(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Move ``module`` to ``device``; if it is frozen, change its memory format to that of the device.

    A module in training keeps its format, which its gradients and optimizer states have too.
    """
    is_frozen = not any(p.requires_grad for p in module.parameters())
    layout = {"memory_format": memory_format(device)} if is_frozen else {}
    return torch.nn.Module.to(module, device, **layout)


def prefer_attention(kernel: SDPBackend) -> None:
    """Let attention in this process run in ``kernel`` where possible, from now on."""
    attention_preference.close()
    alternatives = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    attention_preference.enter_context(sdpa_kernel([kernel, *alternatives], set_priority=True))


def weights_hash(module: torch.nn.Module) -> str:
    """sha256 over names and values of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


@dataclass
class Backbone:
    """A backbone whose parts are loaded at first use; all parts are frozen.

    ``geometry`` names a folder of configurations in this package, from which ``weights="random"`` builds the parts if
    ``path`` is on a hub. ``dtype`` is that of UNet and text encoder: float32, bfloat16, or auto (bfloat16 on a GPU);
    everything else, latents too, has at least float32. ``attention`` is the kernel of ``ATTENTION`` that this process
    prefers on a GPU. ``words`` maps learned words, in lower case, to their tokens (see ``textual_inversion.learn``).
    ``attachments`` holds other networks that were loaded for this backbone, by path, because many rows of a table use
    the same ControlNets. ``hashes`` caches hashes by part.
    """

    path: str
    weights: str = "hub"
    dtype: torch.dtype | str = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    geometry: str | None = None
    attention: str = "native"
    words: dict[str, list[str]] = field(default_factory=dict)
    attachments: dict = field(default_factory=dict, repr=False)
    hashes: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.weights not in ("hub", "random"):
            raise UserError(f"model.weights={self.weights}: choose hub or random")
        if isinstance(self.dtype, str):
            default = DTYPES["bfloat16" if torch.cuda.is_available() else "float32"]
            if self.dtype not in ("auto", *DTYPES):
                raise UserError(f"model.dtype={self.dtype}: choose auto, {' or '.join(DTYPES)}")
            self.dtype = DTYPES.get(self.dtype, default)
        if self.attention not in ATTENTION:
            raise UserError(f"model.attention={self.attention}: choose {', '.join(ATTENTION)}")
        if self.attention != "native":
            if not torch.cuda.is_available():
                raise UserError(f"model.attention={self.attention}: only a GPU has a choice; leave it at native here")
            prefer_attention(ATTENTION[self.attention])
        uses_geometry = self.weights == "random" and self.geometry
        self.path = str(GEOMETRY / self.geometry) if uses_geometry else backbone_path(self.path)
        if os.path.isdir(self.path):
            return
        if self.path == "tiny":
            raise UserError(
                "the tiny backbone is not in this checkout: make backbone trains it, or give another model.path"
            )
        if self.path.count("/") != 1 or self.path.startswith((".", "/")):  # a hub id is owner/name
            raise UserError(f"no backbone in {self.path}: give a folder in diffusers layout or a hub id as model.path")

    def _part(self, name: str) -> Any:
        part = load_part(self.path, name, self.weights, self.dtype if name in STEP_PARTS else self.precise_dtype)
        return part if name in WEIGHTLESS_PARTS else move_module(part, self.device)

    @cached_property
    def vae(self) -> "AutoencoderKL":
        return self._part("vae")

    @cached_property
    def unet(self) -> "UNet2DConditionModel":
        return self._part("unet")

    @cached_property
    def text_encoder(self) -> "CLIPTextModel":
        return self._part("text_encoder")

    @cached_property
    def text_tower(self) -> "CLIPTextModelWithProjection":
        return self._part("text_tower")

    @cached_property
    def image_encoder(self) -> "CLIPVisionModelWithProjection":
        return self._part("image_encoder")

    @cached_property
    def captioner(self) -> "BlipForConditionalGeneration":
        return self._part("captioner")

    @cached_property
    def tokenizer(self) -> "CLIPTokenizer":
        """The backbone's tokenizer; a geometry has none and uses that of ``tiny``, enough for random weights."""
        if Path(self.path).parent != GEOMETRY:
            return self._part("tokenizer")
        tokenizer = load_part(str(ASSETS / "tiny"), "tokenizer")
        config = json.loads((Path(self.path) / "text_encoder" / "config.json").read_text())
        tokenizer.model_max_length = config["max_position_embeddings"]
        return tokenizer

    @cached_property
    def scheduler(self) -> "DDIMScheduler":
        return self._part("scheduler")

    @cached_property
    def processor(self) -> "ProcessorMixin":
        return self._part("processor")

    @property
    def precise_dtype(self) -> torch.dtype:
        """The dtype of latents, text states and all parts that do not run in every step: float32 at least."""
        return torch.promote_types(self.dtype, torch.float32)

    def load_precise(self, part: str) -> torch.nn.Module:
        """A part in ``precise_dtype``, for a trainable copy; read again from its file if it was loaded in bfloat16."""
        if self.dtype == self.precise_dtype or self.weights == "random":
            return getattr(self, part)
        return load_part(self.path, part, dtype=self.precise_dtype)

    def with_unet(self, unet: torch.nn.Module) -> "Backbone":
        """The same backbone with another UNet; all other loaded parts are shared."""
        backbone = Backbone(self.path, self.weights, self.dtype, self.device)
        vars(backbone).update({**vars(self), "unet": move_module(unet, self.device)})
        return backbone

    # ------------------------------------------------------------------------------------------------ facts

    @property
    def name(self) -> str:
        """The name of this backbone in exported files: a shipped backbone's name, else the folder or hub id."""
        return Path(self.path).name if Path(self.path).parent in (ASSETS, GEOMETRY) else self.path

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return self.vae.config.latent_channels

    @property
    def resolution(self) -> int:
        """Side in pixels at which the UNet was trained; that of the VAE if the backbone has no UNet yet."""
        if os.path.isdir(self.path) and not os.path.isdir(os.path.join(self.path, "unet")):
            return self.vae.config.sample_size
        return self.unet.config.sample_size * self.factor

    @property
    def prediction_type(self) -> str:
        return self.scheduler.config.prediction_type

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """abar_t for t = 0 .. 999, float32, 1-D."""
        return self.scheduler.alphas_cumprod.to(self.device, torch.float32)

    def folder(self, part: str) -> Path:
        """The folder of a part; a part of a hub id is fetched."""
        name = FOLDERS.get(part, part)
        return Path(self.path) / name if os.path.isdir(self.path) else fetch_folder(self.path, name, REMEDY)

    def hash(self, part: str) -> str:
        """sha256 over a part's weight files and configuration.

        It is ``random`` for random weights, and the path for a part that a local backbone does not have. Files are read
        once, because they may have gigabytes.
        """
        if self.weights == "random":
            return self.weights
        if part not in self.hashes:
            self.hashes[part] = self.read_hash(part)
        return self.hashes[part]

    def read_hash(self, part: str) -> str:
        """Compute the ``hash`` of a part from its files."""
        folder, digest = self.folder(part), hashlib.sha256()
        if not folder.is_dir():
            return f"{self.path}/{part}"
        for file in sorted(folder.iterdir()):
            if file.suffix in (".safetensors", ".json"):
                digest.update(file.name.encode())
                with open(file, "rb") as stream:
                    while piece := stream.read(1 << 24):  # weights may be larger than the free memory
                        digest.update(piece)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> "Backbone":
        """Move the loaded parts to ``device``; parts that are loaded later go there too."""
        self.device = torch.device(device)
        for name, part in vars(self).items():
            if isinstance(part, torch.nn.Module):
                vars(self)[name] = move_module(part, self.device)
            elif name == "alphas_cumprod":
                vars(self)[name] = part.to(self.device)
        return self

    # ------------------------------------------------------------------------------------------------ codec

    @torch.no_grad()
    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """Encode B x 3 x H x W in [-1, 1] -> B x 2C x h x w: mean and log-variance of q(z | x), not scaled."""
        return self.vae.encode(x.to(self.vae.dtype)).latent_dist.parameters

    def latent(self, moments: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled latent B x C x h x w: a posterior sample with unit ``noise``, or the posterior mean without noise.

        The methods take the mean of a masked picture, so that an output depends on its seed by its noise alone;
        diffusers' inpainting pipelines take a sample.
        """
        return scaled_latent(moments, self.vae.config.scaling_factor, noise)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Decode a scaled latent -> B x 3 x H x W in about [-1, 1], not clamped. Gradients reach the latent."""
        return self.vae.decode(z.to(self.vae.dtype) / self.vae.config.scaling_factor).sample

    # ------------------------------------------------------------------------------------------------ text

    def tokens(self, prompts: list[str]) -> torch.Tensor:
        """The token ids of prompts, B x T int64, padded and truncated to the tokenizer's length."""
        length, prompts = self.tokenizer.model_max_length, [self.spell_out(prompt) for prompt in prompts]
        inputs = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return inputs.input_ids

    def encode(self, text: str) -> list[int]:
        """The token ids of a few words, without the tokens of beginning and end."""
        return self.tokenizer(self.spell_out(text), add_special_tokens=False).input_ids

    def unread_ends(self, prompts: Sequence[str]) -> list[str]:
        """What the text encoder does not read of each prompt, since it is too long; empty where all is read."""
        length = self.tokenizer.model_max_length - 2  # beginning and end
        ids = self.tokenizer([self.spell_out(prompt) for prompt in prompts], add_special_tokens=False).input_ids
        return self.tokenizer.batch_decode([tokens[length:] for tokens in ids])

    def spell_out(self, text: str) -> str:
        """Replace each learned word of ``text``, in any case, by its tokens."""
        names = "|".join(map(re.escape, self.words))
        return re.sub(names, lambda m: " ".join(self.words[m[0].lower()]), text, flags=re.I) if names else text

    @torch.no_grad()
    def text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encode ids B x T -> text states B x T x D, to which the UNet attends."""
        return self.text_encoder(tokens.to(self.device))[0].to(self.precise_dtype)

    def prompt(self, prompts: list[str]) -> torch.Tensor:
        """Encode B prompts -> text states B x T x D."""
        return self.text(self.tokens(prompts))


def scaled_latent(moments: torch.Tensor, scale: float, noise: torch.Tensor | None = None) -> torch.Tensor:
    """z = scale (mean + exp(logvar / 2) noise), B x 2C x h x w -> B x C x h x w; the mean without noise."""
    mean, logvar = moments.float().chunk(2, dim=1)
    if noise is None:
        return scale * mean
    return scale * (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise)


def write_model_index(folder: Path, pipeline: str = "StableDiffusionInpaintPipeline") -> None:
    """Write ``model_index.json`` with the parts in ``folder``, so that diffusers' pipelines can load it."""
    from diffusers import __version__

    index = {"_class_name": pipeline, "_diffusers_version": __version__}
    index |= {part: list(CLASSES[part]) for part in DIFFUSION if (folder / part).is_dir()}
    index |= {part: [None, None] for part in ("safety_checker", "feature_extractor")}
    index["requires_safety_checker"] = False
    write_json(folder / "model_index.json", index)


def ship(source: Path, target: Path, dtype: torch.dtype = torch.float16) -> dict[str, int]:
    """Copy a trained backbone to ``target`` with its weights in ``dtype`` (safetensors); returns bytes by part.

    The text encoder keeps its CLIP projection, which pipelines ignore and CLIP scores need.
    """
    target.mkdir(parents=True, exist_ok=True)
    folders, sizes = {part: (part,) for part in ("vae", "unet", "image_encoder", "tokenizer", "scheduler")}, {}
    folders |= {"text_encoder": ("text_tower",), "captioner": ("captioner", "processor")}
    for folder, parts in folders.items():
        if not (source / folder).is_dir():
            continue
        with replace_folder(target / folder) as partial:
            for part in parts:
                model = load_part(str(source), part)
                if part not in WEIGHTLESS_PARTS:  # diffusers' own ``to`` warns about modules to keep in float32
                    model = torch.nn.Module.to(model, dtype)
                model.save_pretrained(partial)
        sizes[folder] = sum(file.stat().st_size for file in (target / folder).iterdir())
    write_model_index(target)
    return sizes
