"""A backbone: a folder in diffusers layout, and everything the rest of the code may ask of it.

All code is blind to which backbone it runs on: latent factor, channels, resolution, prediction type and latent scale
come from the backbone's own configuration files. Latents are multiplied by the VAE's scaling factor, hints are in [0,
1], images in [-1, 1].
"""

import hashlib
import json
import os
import re
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from harmony.core.errors import UserError
from harmony.core.files import write_json
from harmony.core.hub import fetch_folder

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

ASSETS = Path(__file__).resolve().parents[1] / "assets"
GEOMETRY = ASSETS / "geometry"  # true sizes without weights: the configurations that diffusers and transformers read
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
    "processor": ("transformers", "AutoProcessor"),  # the captioner's
}
FOLDERS = {"text_tower": "text_encoder", "processor": "captioner"}  # the other parts lie in a folder of their own name
WEIGHTLESS = ("tokenizer", "scheduler", "processor")
MEND = (
    "fetch it where there is a network and give model.path=FOLDER, or model.weights=random for the architecture alone"
)
FROZEN = ("unet", "text_encoder")  # what every step of training and sampling runs
# Kernels that attention may run in on a GPU; native leaves the choice to PyTorch.
ATTENTION = {"native": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
preferred_attention = ExitStack()  # of the process
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def backbone_path(name: str | os.PathLike) -> str:
    """The folder of a shipped backbone (``tiny``), a folder that exists, or the name itself, then taken as a hub id."""
    shipped = ASSETS / str(name)
    if os.sep not in str(name) and (shipped / "model_index.json").exists():
        return str(shipped)
    return str(name)


def load_part(path: str, part: str, weights: str = "hub", dtype: torch.dtype = torch.float32) -> Any:
    """One part of a backbone, frozen and in eval mode.

    ``weights="random"`` builds the architecture from the backbone's configuration without reading weights. UserError
    when the part is not there.
    """
    import importlib

    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()  # the projection of the text tower, which a plain text encoder leaves out, is no news
    library, name = CLASSES[part]
    cls = getattr(importlib.import_module(library), name)
    folder = FOLDERS.get(part, part)
    local = (
        os.path.join(path, folder)
        if os.path.isdir(path)
        else str(fetch_folder(path, folder, MEND, weights != "random"))
    )
    if not os.path.isdir(local):
        raise UserError(f"backbone {path} has no {part}: make backbone trains one, or give another model.path")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if part in WEIGHTLESS:
                return cls.from_pretrained(local)
            if weights == "random":
                if library == "diffusers":
                    model = cls.from_config(cls.load_config(local))
                    torch.nn.Module.to(model, dtype)  # diffusers' own warns of modules to keep in float32: none here
                else:
                    model = cls(cls.config_class.from_pretrained(local)).to(dtype)
            else:
                kind = {"torch_dtype": dtype} if library == "diffusers" else {"dtype": dtype}
                model = cls.from_pretrained(local, use_safetensors=True, **kind)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load {part} of backbone {path}: {str(error).splitlines()[0]}") from error
    forget_path(model)
    return model.requires_grad_(False).eval()


def forget_path(model: torch.nn.Module) -> None:
    """What is saved of ``model`` later, and may travel, does not say where on this machine it was read."""
    if hasattr(model, "register_to_config"):  # diffusers
        model.register_to_config(_name_or_path="")
    else:
        model.config._name_or_path = ""


def memory_format(device: torch.device) -> torch.memory_format:
    """How weights of convolutions lie on ``device``: channels last on a GPU, whose tensor cores want them so.

    On a CPU that makes no difference (measured).
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def placed(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """``module`` on ``device``, in its ``memory_format`` where it is frozen.

    What is trained stays as it is: its gradients' buffers and its optimiser are laid out already.
    """
    frozen = not any(p.requires_grad for p in module.parameters())
    layout = {"memory_format": memory_format(device)} if frozen else {}
    return torch.nn.Module.to(module, device, **layout)


def prefer_attention(kernel: SDPBackend) -> None:
    """From now on attention in this process runs in ``kernel`` wherever it can, else in another one."""
    preferred_attention.close()
    others = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    preferred_attention.enter_context(sdpa_kernel([kernel, *others], set_priority=True))


def weights_hash(module: torch.nn.Module) -> str:
    """sha256 over names and values of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


@dataclass
class Backbone:
    """A loaded backbone. Parts are read when first asked for; all are frozen.

    ``geometry`` names a folder of configurations that come with the package: what ``weights="random"`` is built from
    where those of ``path`` are on a hub. ``dtype`` is that of UNet and text encoder: float32, bfloat16, or auto, which
    is bfloat16 on a GPU; everything else has at least float32, latents too. ``attention``: the kernel of ``ATTENTION``
    that is preferred on a GPU, in the whole process. ``words``: learnt words, lower case, and
    the tokens of each (see ``learn`` of ``textual_inversion``). ``loaded``: what was loaded for this backbone
    beside its own parts, by path: a table has many rows of the same ControlNets. ``hashes``: those known, by part.
    """

    path: str
    weights: str = "hub"
    dtype: torch.dtype | str = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    geometry: str | None = None
    attention: str = "native"
    words: dict[str, list[str]] = field(default_factory=dict)
    loaded: dict = field(default_factory=dict, repr=False)
    hashes: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.weights not in ("hub", "random"):
            raise UserError(f"model.weights={self.weights}: choose hub or random")
        if isinstance(self.dtype, str):
            fitting = DTYPES["bfloat16" if torch.cuda.is_available() else "float32"]
            if self.dtype not in ("auto", *DTYPES):
                raise UserError(f"model.dtype={self.dtype}: choose auto, {' or '.join(DTYPES)}")
            self.dtype = DTYPES.get(self.dtype, fitting)
        if self.attention not in ATTENTION:
            raise UserError(f"model.attention={self.attention}: choose {', '.join(ATTENTION)}")
        if self.attention != "native":
            if not torch.cuda.is_available():
                raise UserError(f"model.attention={self.attention}: only a GPU has a choice; leave it at native here")
            prefer_attention(ATTENTION[self.attention])
        shapes = self.weights == "random" and self.geometry
        self.path = str(GEOMETRY / self.geometry) if shapes else backbone_path(self.path)
        if os.path.isdir(self.path):
            return
        if self.path == "tiny":
            raise UserError(
                "the tiny backbone is not in this checkout: make backbone trains it, or give another model.path"
            )
        if self.path.count("/") != 1 or self.path.startswith((".", "/")):  # a hub id is owner/name
            raise UserError(f"no backbone in {self.path}: give a folder in diffusers layout or a hub id as model.path")

    def _part(self, name: str) -> Any:
        part = load_part(self.path, name, self.weights, self.dtype if name in FROZEN else self.precise)
        return part if name in WEIGHTLESS else placed(part, self.device)

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
        """The backbone's own; random weights understand no words, so that any does where a geometry has none."""
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
    def precise(self) -> torch.dtype:
        """Of latents, text states and whatever does not run in every step: float32 at least."""
        return torch.promote_types(self.dtype, torch.float32)

    def unrounded(self, part: str) -> torch.nn.Module:
        """A part in float32 at least, for a trainable copy: the loaded one, or its file anew where that is rounded."""
        if self.dtype == self.precise or self.weights == "random":
            return getattr(self, part)
        return load_part(self.path, part, dtype=self.precise)

    def with_unet(self, unet: torch.nn.Module) -> "Backbone":
        """The same backbone, its loaded parts shared, with another UNet in place of its own."""
        backbone = Backbone(self.path, self.weights, self.dtype, self.device)
        vars(backbone).update({**vars(self), "unet": placed(unet, self.device)})
        return backbone

    # ------------------------------------------------------------------------------------------------ facts

    @property
    def name(self) -> str:
        """What to call this backbone in a file that may travel: the shipped backbone's name, else the folder or hub
        id.
        """
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
        """Side in pixels at which the UNet was trained; the VAE's while the backbone has no UNet yet."""
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
        """Where the files of a part lie; those of a hub id are fetched."""
        name = FOLDERS.get(part, part)
        return Path(self.path) / name if os.path.isdir(self.path) else fetch_folder(self.path, name, MEND)

    def hash(self, part: str) -> str:
        """sha256 over a part's weight files and configuration, or ``random`` for weights that come from no file; of a
        part that a local backbone does not have, its name. Files are read once: they may have gigabytes.
        """
        if self.weights == "random":
            return self.weights
        if part not in self.hashes:
            self.hashes[part] = self.read_hash(part)
        return self.hashes[part]

    def read_hash(self, part: str) -> str:
        """``hash`` of a part from its files."""
        folder, digest = self.folder(part), hashlib.sha256()
        if not folder.is_dir():
            return f"{self.path}/{part}"
        for file in sorted(folder.iterdir()):
            if file.suffix in (".safetensors", ".json"):
                digest.update(file.name.encode())
                with open(file, "rb") as opened:
                    while piece := opened.read(1 << 24):  # weights may be larger than what memory has left
                        digest.update(piece)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> "Backbone":
        """Move the loaded parts; those loaded later follow."""
        self.device = torch.device(device)
        for name, part in vars(self).items():
            if isinstance(part, torch.nn.Module):
                vars(self)[name] = placed(part, self.device)
            elif name == "alphas_cumprod":
                vars(self)[name] = part.to(self.device)
        return self

    # ------------------------------------------------------------------------------------------------ codec

    @torch.no_grad()
    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """B x 3 x H x W in [-1, 1] -> B x 2C x h x w: mean and log-variance of q(z | x), not scaled."""
        return self.vae.encode(x.to(self.vae.dtype)).latent_dist.parameters

    def latent(self, moments: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled latent B x C x h x w: a posterior sample with the given unit noise, the posterior mean without."""
        return scaled_latent(moments, self.vae.config.scaling_factor, noise)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Scaled latent -> B x 3 x H x W in about [-1, 1], not clamped. Gradients flow to latents that want them."""
        return self.vae.decode(z.to(self.vae.dtype) / self.vae.config.scaling_factor).sample

    # ------------------------------------------------------------------------------------------------ text

    def tokens(self, prompts: list[str]) -> torch.Tensor:
        """B x T int64, padded and truncated to the tokenizer's length."""
        length, prompts = self.tokenizer.model_max_length, [self.spelled(prompt) for prompt in prompts]
        encoded = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return encoded.input_ids

    def encode(self, text: str) -> list[int]:
        """The ids of a few words, without beginning and end."""
        return self.tokenizer(self.spelled(text), add_special_tokens=False).input_ids

    def spelled(self, text: str) -> str:
        """``text`` with each learnt word written out as its tokens, whatever its case, as tokenizers read it."""
        names = "|".join(map(re.escape, self.words))
        return re.sub(names, lambda m: " ".join(self.words[m[0].lower()]), text, flags=re.I) if names else text

    @torch.no_grad()
    def text(self, tokens: torch.Tensor) -> torch.Tensor:
        """B x T ids -> B x T x D states that the UNet attends to."""
        return self.text_encoder(tokens.to(self.device))[0].to(self.precise)

    def prompt(self, prompts: list[str]) -> torch.Tensor:
        """B prompts -> B x T x D."""
        return self.text(self.tokens(prompts))


def scaled_latent(moments: torch.Tensor, scale: float, noise: torch.Tensor | None = None) -> torch.Tensor:
    """z = scale (mean + exp(logvar / 2) noise), B x 2C x h x w -> B x C x h x w; the mean when no noise is given."""
    mean, logvar = moments.float().chunk(2, dim=1)
    if noise is None:
        return scale * mean
    return scale * (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise)


def write_model_index(folder: Path, pipeline: str = "StableDiffusionInpaintPipeline") -> None:
    """``model_index.json`` naming the parts that lie in ``folder``, so that diffusers' pipelines load it."""
    from diffusers import __version__

    index = {"_class_name": pipeline, "_diffusers_version": __version__}
    index |= {part: list(CLASSES[part]) for part in DIFFUSION if (folder / part).is_dir()}
    index |= {part: [None, None] for part in ("safety_checker", "feature_extractor")}
    index["requires_safety_checker"] = False
    write_json(folder / "model_index.json", index)


def ship(source: Path, target: Path, dtype: torch.dtype = torch.float16) -> dict[str, int]:
    """Copy a trained backbone to ``target`` with its weights in ``dtype`` (safetensors); returns bytes a part.

    The text encoder keeps its CLIP projection, which pipelines ignore and CLIP scores need.
    """
    import shutil

    target.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for part in ("vae", "unet", "text_tower", "image_encoder", "captioner", "tokenizer", "scheduler", "processor"):
        folder = FOLDERS.get(part, part)
        if not (source / folder).is_dir():
            continue
        model = load_part(str(source), part)
        if part not in WEIGHTLESS:
            shutil.rmtree(target / folder, ignore_errors=True)
            model = torch.nn.Module.to(model, dtype)  # diffusers' own warns of modules to keep in float32: none here
        model.save_pretrained(target / folder)
        sizes[folder] = sum(file.stat().st_size for file in (target / folder).iterdir())
    write_model_index(target)
    return sizes
