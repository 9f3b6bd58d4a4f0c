"""``HarmonyPipeline``: the ControlNets of an export in one call of diffusers, with crop, hint and paste-back.

The source of the ``pipeline.py`` in exports, into which ``bundle`` writes it with everything of harmony that it needs.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    SchedulerMixin,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import hf_hub_download
from PIL import Image, ImageCms, ImageOps
from transformers import CLIPTextModel, CLIPTokenizer

from harmony.core.errors import UserError
from harmony.methods.inpainting import average_mirrored
from harmony.methods.insert import AUTO, FULL, NONE, cut
from harmony.methods.method import Composite
from harmony.models.backbone import scaled_latent
from harmony.models.controlnet import to_cells
from harmony.pixels.color_profiles import check_profile
from harmony.pixels.hints import hint
from harmony.pixels.images import from_model, to_hint, to_model, to_rgb
from harmony.pixels.masks import OBJECT, to_latent
from harmony.sampling.ddim import clean_latent, level, noise_for, to_eps

PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")  # of the backbone


@dataclass(frozen=True)
class Request:
    """What one call asks for: a caption, the weight of each ControlNet, the steps, the guidance and the seed."""

    prompt: str
    scales: tuple[float, ...]
    steps: int
    guidance: float
    seed: int


@dataclass(frozen=True)
class Condition:
    """What the networks see in every step of a batch.

    ``latents``: hole and masked latent, B x (1 + C) x h x w; ``text``: its states, with guidance those of the empty
    text before them; ``controls``: ControlNet, hint and weight of each that counts.
    """

    latents: torch.Tensor
    text: torch.Tensor
    controls: list[tuple[ControlNetModel, torch.Tensor, float]]
    guidance: float

    def double(self) -> "Condition":
        """The same for a batch of twice the size."""
        controls = [(net, picture.repeat(2, 1, 1, 1), scale) for net, picture, scale in self.controls]
        text = torch.cat([half.repeat(2, 1, 1) for half in self.text.chunk(1 + (self.guidance != 1))])
        return Condition(self.latents.repeat(2, 1, 1, 1), text, controls, self.guidance)


class HarmonyPipeline(DiffusionPipeline):
    """Puts the object of a composite into the light of its photograph; all pixels outside the hole stay as they are.

    ``controlnet`` and ``structure``: the ControlNets; ``structure`` may also be the folder or hub id of another export.
    ``backbone``: the folder or hub id of the inpainting model that they were trained on, for parts that are not given.
    ``hints``: name of a ControlNet -> what its ``hint.json`` says of the picture that it sees.
    """

    model_cpu_offload_seq = "text_encoder->controlnet->structure->unet->vae"
    _optional_components = ["structure", *PARTS]

    def __init__(
        self,
        controlnet: ControlNetModel,
        structure: ControlNetModel | str | None = None,
        vae: AutoencoderKL | None = None,
        unet: UNet2DConditionModel | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        scheduler: SchedulerMixin | None = None,
        backbone: str | None = None,
        hints: dict | None = None,
    ):
        super().__init__()
        hints = dict(hints or {})
        if isinstance(structure, str):
            structure, hints["structure"] = load_export(structure, controlnet.dtype)
        parts = dict(zip(PARTS, (vae, unet, text_encoder, tokenizer, scheduler), strict=True))
        if None in parts.values():
            loaded = load_backbone(backbone, controlnet.dtype)
            parts = {name: loaded[name] if part is None else part for name, part in parts.items()}
        self.register_modules(controlnet=controlnet, structure=structure, **parts)
        self.register_to_config(backbone=backbone, hints=hints)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        image: Image.Image | np.ndarray,
        mask_image: Image.Image | np.ndarray,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        seed: int = 0,
        detail: str = AUTO,
        feather: float = 0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[list]:
        """Harmonize one photograph of any size; its picture is ``.images[0]``, in the photograph's color profile.

        ``prompt``: what the finished picture shows. ``image``: the photograph with the object pasted into it;
        ``mask_image``: white where the object is. ``controlnet_conditioning_scale``: the weight of the ControlNet, or
        those of both. ``detail``: ``full`` keeps the photograph's own detail and takes the change of light alone from
        the networks, ``none`` pastes what they paint, ``auto`` is ``full`` where the square around the object is larger
        than the backbone's. ``feather``: pixels over which the rim of the hole blends. ``output_type``: pil or np
        (uint8).
        """
        if detail not in (AUTO, FULL, NONE):
            raise UserError(f"detail={detail}: give {AUTO}, {FULL} or {NONE}")
        weights = controlnet_conditioning_scale
        scales = tuple(weights) if isinstance(weights, Sequence) else (weights,) * len(self.networks)
        if len(scales) != len(self.networks):
            raise UserError(f"controlnet_conditioning_scale={weights}: give a weight for {len(self.networks)} networks")
        request = Request(prompt, scales, num_inference_steps, guidance_scale, seed)
        profile = read_profile(image)
        pixels, mask = read_pixels(image), read_object(mask_image)
        insertion = cut(self.resolution, pixels, pixels, mask, profile=profile)
        is_larger = insertion.crop.side > self.resolution
        if any(scales) and (detail == FULL or (detail == AUTO and is_larger)):
            before, after = self.relight(insertion.square, request)
        else:
            before, after = None, self.paint(insertion.square, request)
        picture = insertion.paste(after, feather, before).image
        self.maybe_free_model_hooks()
        if output_type == "pil":
            picture = Image.fromarray(picture)
            picture.info |= {"icc_profile": profile} if profile else {}
        return ImagePipelineOutput([picture]) if return_dict else ([picture],)

    # ------------------------------------------------------------------------------------------------ facts

    @property
    def networks(self) -> list[tuple[str, ControlNetModel]]:
        """The ControlNets with their names."""
        pairs = (("controlnet", self.controlnet), ("structure", self.structure))
        return [(name, net) for name, net in pairs if net is not None]

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        """Side in pixels of the square that the backbone fills."""
        return self.unet.config.sample_size * self.factor

    # ------------------------------------------------------------------------------------------------ pictures

    def paint(self, square: Composite, request: Request) -> np.ndarray:
        """Fill the hole of a square by sampling, uint8 R x R x 3."""
        condition, z = self.see([square], request)
        self.scheduler.set_timesteps(request.steps, device=self._execution_device)
        z = z * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self.predict(self.scheduler.scale_model_input(z, t), t, condition)
            z = self.scheduler.step(output, t, z, return_dict=False)[0]
        return self.decode(z)[0]

    def relight(self, square: Composite, request: Request) -> tuple[np.ndarray, np.ndarray]:
        """A square through the autoencoder, and the mean of what the networks may paint in it, uint8 R x R x 3.

        Each is averaged with that of the mirrored square, which errs in other ways.
        """
        both = [square, square.mirror()]
        before = self.decode(self.encode(to_model(np.stack([each.copy_paste() for each in both]))))
        condition, noise = self.see(both, request)
        z, t = torch.cat([noise, -noise]), self.scheduler.config.num_train_timesteps - 1
        a = level(self.scheduler.alphas_cumprod, t).to(z)
        eps = to_eps(self.scheduler.config.prediction_type, self.predict(z, t, condition.double()), z, a)
        after = self.decode(torch.stack(clean_latent(z, eps, a).chunk(2)).mean(0))
        return average_mirrored(before)[0], average_mirrored(after)[0]

    def see(self, squares: Sequence[Composite], request: Request) -> tuple[Condition, torch.Tensor]:
        """What the networks see of squares with one caption and one seed, and the noise, B x C x h x w."""
        device, count = self._execution_device, len(squares)
        pictures = torch.stack([to_model(each.background) for each in squares])
        holes = torch.from_numpy(np.stack([each.hole for each in squares])[:, None]).float()
        masked = self.encode(pictures * (1 - holes))
        latents = torch.cat([to_latent(holes, self.factor).to(device), masked], 1)
        prompts = [""] * count * (request.guidance != 1) + [request.prompt] * count
        controls = [
            (net, torch.stack([to_hint(self.draw(name, each)) for each in squares]).to(device, net.dtype), scale)
            for (name, net), scale in zip(self.networks, request.scales, strict=True)
            if scale != 0
        ]
        noise = noise_for([(request.seed, 0)] * count, masked.shape[1:], device)
        return Condition(latents, self.read(prompts), controls, request.guidance), noise

    def draw(self, name: str, square: Composite) -> np.ndarray:
        """The hint that a ControlNet sees of a square, uint8 R x R x 3."""
        facts = self.config.hints.get(name)
        if facts is None:
            raise UserError(f"the pipeline does not know what {name} sees: give hints={{{name!r}: its hint.json}}")
        parameters = to_cells(facts["parameters"], self.unet.config.sample_size)
        pictures = (square.instance, square.mask, square.background, square.hole)
        return hint(facts["branch"], *pictures, cell=self.factor, **parameters)

    # ------------------------------------------------------------------------------------------------ networks

    def read(self, prompts: list[str]) -> torch.Tensor:
        """The text states of prompts, B x T x D."""
        length = self.tokenizer.model_max_length
        inputs = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(inputs.input_ids.to(self._execution_device))[0]

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """The scaled latents of pictures B x 3 x H x W in [-1, 1], the means of their distributions."""
        pictures = pictures.to(self._execution_device, self.vae.dtype)
        return scaled_latent(self.vae.encode(pictures).latent_dist.parameters, self.vae.config.scaling_factor)

    def decode(self, z: torch.Tensor) -> np.ndarray:
        """Pictures of scaled latents, uint8 B x H x W x 3."""
        return from_model(self.vae.decode(z.to(self.vae.dtype) / self.vae.config.scaling_factor).sample)

    def predict(self, z: torch.Tensor, t: int | torch.Tensor, condition: Condition) -> torch.Tensor:
        """The UNet's output for latents B x C x h x w under the ControlNets, with guidance."""
        halves, dtype = 1 + (condition.guidance != 1), self.unet.dtype
        x = torch.cat([z, condition.latents], 1).repeat(halves, 1, 1, 1).to(dtype)
        times, text = torch.full((len(x),), int(t), device=x.device), condition.text.to(dtype)
        down, middle = None, None
        for net, picture, scale in condition.controls:
            inputs = x[:, : net.config.in_channels], times, text, picture.repeat(halves, 1, 1, 1)
            residuals, last = net(*inputs, conditioning_scale=scale, return_dict=False)
            down = residuals if down is None else [a + b for a, b in zip(down, residuals, strict=True)]
            middle = last if middle is None else middle + last
        options = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        output = self.unet(x, times, text, **options, return_dict=False)[0].to(z.dtype)
        if halves == 1:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + condition.guidance * (conditional - unconditional)


def load_backbone(name: str | None, dtype: torch.dtype) -> dict:
    """The parts of an inpainting model by its folder or hub id."""
    if name is None or not (os.path.isdir(name) or name.count("/") == 1):
        raise UserError(f"there is no backbone {name}: give backbone=, the folder or hub id of what was trained on")
    options = {"torch_dtype": dtype, "use_safetensors": True, "safety_checker": None, "requires_safety_checker": False}
    loaded = StableDiffusionInpaintPipeline.from_pretrained(name, **options)
    return loaded.components | {"scheduler": DDIMScheduler.from_config(loaded.scheduler.config)}


def load_export(name: str, dtype: torch.dtype) -> tuple[ControlNetModel, dict]:
    """The ControlNet of another export by its folder or hub id, and what its ``hint.json`` says."""
    file = Path(name) / "hint.json" if os.path.isdir(name) else Path(hf_hub_download(name, "hint.json"))
    net = ControlNetModel.from_pretrained(name, torch_dtype=dtype, use_safetensors=True)
    return net, json.loads(file.read_text(encoding="utf-8"))


def read_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """The pixels of a picture, upright, uint8 H x W x 3. UserError for an array of another kind."""
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image), "image")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(f"image: an array of {image.dtype}, {image.shape}; give uint8, height x width x 3")
    return image


def read_profile(image: Image.Image | np.ndarray) -> bytes | None:
    """The color profile of a picture where it can be used, both ways; None: its colors are taken as sRGB."""
    profile = image.info.get("icc_profile") if isinstance(image, Image.Image) else None
    if not profile:
        return None
    try:
        check_profile(profile)
    except (OSError, ValueError, ImageCms.PyCMSError):
        return None
    return profile


def read_object(mask: Image.Image | np.ndarray) -> np.ndarray:
    """Where a mask is white, upright, bool H x W; an array of 0 and 1, or of what lies between, from one half on."""
    if isinstance(mask, Image.Image):
        return np.asarray(ImageOps.exif_transpose(mask).convert("L")) > OBJECT
    mask = mask.squeeze()
    return mask > (OBJECT if mask.dtype == np.uint8 and mask.max(initial=0) > 1 else 0.5)
