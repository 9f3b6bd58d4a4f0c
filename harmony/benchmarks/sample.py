"""Benchmark of inpainting with two ControlNets against diffusers' stock pipeline.

Both have the same weights, pictures and guidance. Ours starts from uint8 pictures and computes the hints itself; the
pipeline receives ready tensors.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetInpaintPipeline

from harmony.benchmarks.measure import alternate, count_tflop, measure_matmul_rate
from harmony.core.progress import tell
from harmony.methods.inpainting import Branch, Inpainting, draw_hints
from harmony.methods.method import Composite, make_seeds
from harmony.models.backbone import Backbone, move_module
from harmony.models.controlnet import from_unet, zero_convolutions
from harmony.pixels.images import to_hint, to_model
from harmony.sampling.guidance import Settings

PROMPT = "a photograph of a mushroom"
BRANCHES = ("color", "structure")
STEP_SHARE = 0.4  # of the steps that a better solver needs
MODES = {  # beside the plain exact one: exact without the launch cost of kernels, and cheaper, near-exact ones
    "graphs": {"graphs": True},
    "compiled": {"graphs": True, "compile": True},
    "unipc": {"solver": "unipc"},
    "guided": {"guided": 0.5},
    "encoder": {"encoder_every": 2},
    "near": {"solver": "unipc", "guided": 0.5, "encoder_every": 2},
    "near_graphs": {"solver": "unipc", "guided": 0.5, "encoder_every": 2, "graphs": True},
}


def list_modes(device: str) -> list[str]:
    """Names of the ``MODES`` that a device can run: CUDA graphs need a GPU."""
    return [name for name, options in MODES.items() if device == "cuda" or not options.get("graphs")]


def make_nonzero_net(backbone: Backbone, seed: int) -> torch.nn.Module:
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
        self.branches = [Branch(name, make_nonzero_net(backbone, n)) for n, name in enumerate(BRANCHES)]

    def prepare_ours(self, settings: Settings) -> Callable[[], list[np.ndarray]]:
        """A function that fills the holes by our method."""
        method = Inpainting(self.backbone, self.branches, replace(settings, batch=len(self.pictures)))
        composites = [Composite(x, x, self.mask, self.mask, PROMPT) for x in self.pictures]
        seeds = make_seeds(0, range(len(composites)))
        return lambda: method.fill(composites, seeds)

    def prepare_stock(self, steps: int, guidance: float) -> Callable[[], object]:
        """A function that fills the holes by diffusers' pipeline."""
        backbone = self.backbone
        pipeline = StableDiffusionControlNetInpaintPipeline(
            # the pipeline needs one dtype throughout
            vae=torch.nn.Module.to(copy.deepcopy(backbone.vae), backbone.dtype),
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
        inputs = {
            "image": torch.stack([to_model(x) for x in self.pictures]),
            "mask_image": torch.from_numpy(np.stack(masks)[:, None]).float(),
            "control_image": [
                torch.stack([to_hint(picture) for picture in draw_hints(branch, composites, self.backbone.factor)])
                for branch in self.branches
            ],
        }
        return lambda: pipeline(
            [PROMPT] * len(self.pictures),
            **inputs,
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
    say: Callable[[str], None] = tell,
) -> dict[str, dict[str, float]]:
    """Figures of ``sample`` (exact) and of ``sample_NAME`` for each NAME in ``modes``; rates in pictures a second.

    The default is all modes that the device can run.
    """
    scene = Scene(backbone, batch)
    stock, exact_settings = scene.prepare_stock(steps, guidance), Settings(steps, guidance)
    work = count_tflop(scene.prepare_ours(exact_settings), batch)
    peak = measure_matmul_rate(backbone.device, backbone.dtype)
    results = {}
    names = list_modes(backbone.device.type) if modes is None else modes
    for name, options in {"": {}, **{name: MODES[name] for name in names}}.items():
        settings = replace(exact_settings, **options)
        if "solver" in options:
            settings = replace(settings, steps=max(1, round(STEP_SHARE * steps)))
        say(f"{name or 'exact'}: {settings.steps} steps of {settings.solver}, against {steps} of the stock pipeline")
        rates = alternate(scene.prepare_ours(settings), stock, batch, backbone.device, 1, blocks, say)
        figures = rates.summarize(*((work, peak) if name in ("", "graphs", "compiled") else ()))
        results["_".join(filter(None, ("sample", name)))] = figures | {"seconds": batch / figures["ours"]}
    return results
