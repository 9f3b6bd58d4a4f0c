"""Inpainting with two ControlNets against diffusers' stock pipeline: same weights, pictures and guidance.

Ours begins from uint8 pictures and makes its hints itself; the pipeline is handed finished tensors.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetInpaintPipeline

from harmony.benchmarks.measure import alternate, matmul_rate, tflop
from harmony.methods.inpainting import Branch, Inpainting, hint_pictures
from harmony.methods.method import Composite, seeds_of
from harmony.models.backbone import Backbone, move_module
from harmony.models.controlnet import from_unet, zero_convolutions
from harmony.pixels.images import to_hint, to_model
from harmony.sampling.guidance import Settings

PROMPT = "a photograph of a mushroom"
BRANCHES = ("color", "structure")
FEWER = 0.4  # of the steps, with a better solver
MODES = {  # beside the plain exact one: exact without the launch of each kernel, and what is cheaper and near-exact
    "graphs": {"graphs": True},
    "compiled": {"graphs": True, "compile": True},
    "unipc": {"solver": "unipc"},
    "guided": {"guided": 0.5},
    "encoder": {"encoder_every": 2},
    "near": {"solver": "unipc", "guided": 0.5, "encoder_every": 2},
    "near_graphs": {"solver": "unipc", "guided": 0.5, "encoder_every": 2, "graphs": True},
}


def modes_of(device: str) -> list[str]:
    """Names of ``MODES`` that a device has: graphs are a GPU's."""
    return [name for name, options in MODES.items() if device == "cuda" or not options.get("graphs")]


def awake_net(backbone: Backbone, seed: int) -> torch.nn.Module:
    """A frozen ControlNet whose residuals are not zero, as if it had been trained."""
    torch.manual_seed(seed)
    net = from_unet(backbone.unet, backbone.factor).requires_grad_(False).eval()
    for p in zero_convolutions(net):
        p.normal_(0, 0.02)
    return move_module(torch.nn.Module.to(net, backbone.dtype), backbone.device)


class Scene:
    """``batch`` pictures with a hole each, two ControlNets, and both ways to fill the holes."""

    def __init__(self, backbone: Backbone, batch: int):
        side, rng = backbone.resolution, np.random.default_rng(0)
        self.backbone, self.mask = backbone, np.zeros((side, side), bool)
        self.mask[side // 4 : side // 2, side // 4 : side // 2] = True
        self.pictures = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(batch)]
        self.branches = [Branch(name, awake_net(backbone, n)) for n, name in enumerate(BRANCHES)]

    def ours(self, settings: Settings) -> Callable[[], list[np.ndarray]]:
        method = Inpainting(self.backbone, self.branches, replace(settings, batch=len(self.pictures)))
        composites = [Composite(x, x, self.mask, self.mask, PROMPT) for x in self.pictures]
        seeds = seeds_of(0, range(len(composites)))
        return lambda: method.fill(composites, seeds)

    def stock(self, steps: int, guidance: float) -> Callable[[], object]:
        backbone = self.backbone
        pipeline = StableDiffusionControlNetInpaintPipeline(
            vae=torch.nn.Module.to(
                copy.deepcopy(backbone.vae), backbone.dtype
            ),  # of one dtype with the rest, which it wants
            text_encoder=backbone.text_encoder,
            tokenizer=backbone.tokenizer,
            unet=backbone.unet,
            controlnet=[branch.net for branch in self.branches],
            scheduler=DDIMScheduler.from_config(backbone.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        masks = [self.mask] * len(self.pictures)
        composites = [Composite(x, x, self.mask, self.mask) for x in self.pictures]
        given = {
            "image": torch.stack([to_model(x) for x in self.pictures]),
            "mask_image": torch.from_numpy(np.stack(masks)[:, None]).float(),
            "control_image": [
                torch.stack([to_hint(picture) for picture in hint_pictures(branch, composites)])
                for branch in self.branches
            ],
        }
        return lambda: pipeline(
            [PROMPT] * len(self.pictures),
            **given,
            height=backbone.resolution,
            width=backbone.resolution,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
        )


def bench_sample(
    backbone: Backbone,
    batch: int,
    steps: int,
    guidance: float,
    blocks: int,
    modes: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, float]]:
    """``sample`` (exact) and ``sample_NAME`` -> figures, rates in pictures a second.

    NAMEs are those of ``modes``, by default all that the device has.
    """
    scene = Scene(backbone, batch)
    stock, exact = scene.stock(steps, guidance), Settings(steps, guidance)
    work = tflop(scene.ours(exact), batch)
    peak = matmul_rate(backbone.device, backbone.dtype)
    found = {}
    chosen = modes_of(backbone.device.type) if modes is None else modes
    for name, options in {"": {}, **{name: MODES[name] for name in chosen}}.items():
        settings = replace(exact, **options)
        if "solver" in options:
            settings = replace(settings, steps=max(1, round(FEWER * steps)))
        say(f"{name or 'exact'}: {settings.steps} steps of {settings.solver}, against {steps} of the stock pipeline")
        rates = alternate(scene.ours(settings), stock, batch, backbone.device, 1, blocks, say)
        figures = rates.figures(*((work, peak) if name in ("", "graphs", "compiled") else ()))
        found["_".join(filter(None, ("sample", name)))] = figures | {"seconds": batch / figures["ours"]}
    return found
