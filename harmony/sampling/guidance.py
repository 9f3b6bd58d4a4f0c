"""Inpainting with prompts and ControlNets: the nine-channel UNet with guidance and a weighted sum of residuals.

Liu 2025, eq. 7 with the names of its two branches corrected: skip_i <- skip_i + sum_k lambda_k r_i^(k), the same for
the middle block. A net of weight 0 does not run, so that with all weights 0 the result is exactly plain inpainting. The
hints' embeddings and the keys and values of the text are the same in every step and are computed once.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import diffusers
import torch

from harmony.core.errors import UserError
from harmony.models.attention import cached_cross_attention, keys_and_values
from harmony.models.backbone import Backbone
from harmony.models.unet_halves import Activations, Residuals, decode, embed_time, encode, residuals
from harmony.sampling.cuda_graphs import get_recording, identity, run_concurrently
from harmony.sampling.ddim import clean_latent, level, sample, to_eps

Control = tuple[torch.nn.Module, torch.Tensor, float]  # ControlNet, hint B x 3 x H x W in [0, 1], weight
SOLVERS = {"ddim": "DDIMScheduler", "dpmsolver++": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}


@dataclass(frozen=True)
class Schedule:
    """How a batch is sampled: ``steps`` of a ``solver`` with ``guidance`` w, and options that save time.

    ``guided``: the share of the steps, from the noisiest on, that use guidance. ``encoder_every``: the ControlNets and
    the first half of the UNet run in every n-th step, and the steps between reuse their activations (encoder
    propagation; Li 2023, Faster Diffusion). ``graphs``: a step is recorded as a CUDA graph, once for each shape, and
    replayed: the same numbers without launching each kernel. ``compile``: both halves of the UNet and the ControlNets
    are compiled, which takes minutes once and changes numbers only by rounding. UserError for invalid values.
    """

    steps: int = 50
    guidance: float = 7.5
    solver: str = field(default="ddim", kw_only=True)
    guided: float = field(default=1.0, kw_only=True)
    encoder_every: int = field(default=1, kw_only=True)
    graphs: bool = field(default=False, kw_only=True)
    compile: bool = field(default=False, kw_only=True)

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise UserError(f"solver={self.solver}: choose one of {', '.join(SOLVERS)}")
        if type(self.guided) not in (int, float) or not 0 <= self.guided <= 1:
            raise UserError(f"guided={self.guided}: give a share of the steps, 0 to 1")
        if type(self.encoder_every) is not int or self.encoder_every < 1:
            raise UserError(f"encoder_every={self.encoder_every}: give 1 (in every step) or a larger whole number")
        for name in ("graphs", "compile"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"{name}={getattr(self, name)}: give true or false")


def embed_hints(controls: Sequence[Control]) -> list[Control]:
    """Replace the hint of each control by the hint encoder's output; leave out controls of weight 0."""
    return [
        (net, net.controlnet_cond_embedding(hint.to(net.conv_in.weight.dtype)), weight)
        for net, hint, weight in controls
        if weight != 0
    ]


def run_control(
    control: Control, z: torch.Tensor, t: torch.Tensor, text: torch.Tensor, run: Callable[..., Residuals] = residuals
) -> Residuals:
    """The weighted residuals of one control of ``embed_hints``; the net reads its input channels of ``z``."""
    net, embedding, weight = control
    dtype = net.conv_in.weight.dtype
    down, middle = run(net, z[:, : net.config.in_channels].to(dtype), t, text.to(dtype), embedding)
    return tuple((weight * r).to(z.dtype) for r in down), (weight * middle).to(z.dtype)


def add_residuals(a: Residuals, b: Residuals) -> Residuals:
    """Add the residuals of two ControlNets."""
    return tuple(x + y for x, y in zip(a[0], b[0], strict=True)), a[1] + b[1]


def control_residuals(
    controls: Sequence[Control], z: torch.Tensor, t: torch.Tensor, text: torch.Tensor
) -> Residuals | None:
    """The weighted sum of the residuals of controls of ``embed_hints``; None without controls."""
    results = [run_control(control, z, t, text) for control in controls]
    return functools.reduce(add_residuals, results) if results else None


def predict(
    unet: torch.nn.Module, z: torch.Tensor, condition: torch.Tensor, t: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """The UNet's output (eps, or v for a backbone that predicts it), B x C x h x w, of the latent's dtype.

    ``condition`` = [hole, masked latent] is B x (1 + C) x h x w.
    """
    dtype = unet.conv_in.weight.dtype
    return unet(torch.cat([z, condition], 1).to(dtype), t, text.to(dtype), return_dict=False)[0].to(z.dtype)


class Network:
    """UNet and ControlNets with the inputs that are constant over the steps of a batch; it computes one step.

    ``condition`` B x (1 + C) x h x w; ``text`` rows x T x D, the conditional half last; ``controls`` from
    ``embed_hints`` for as many rows. ``keys_and_values`` of the text are computed once.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        condition: torch.Tensor,
        text: torch.Tensor,
        controls: list[Control],
        compiles: bool,
    ):
        self.unet, self.condition, self.text, self.controls = unet, condition, text, controls
        self.keys_and_values = keys_and_values([unet, *(net for net, _, _ in controls)], text)
        self.prepare = compile_once if compiles else lambda function: function
        self.first_halves: dict[int, tuple[Activations, Residuals | None]] = {}  # rows -> output of the first half

    @property
    def constants(self) -> list[torch.Tensor]:
        embeddings = [embedding for _, embedding, _ in self.controls]
        return [self.condition, self.text, *embeddings, *(p.output.value for p in self.keys_and_values)]

    def copy_constants(self) -> None:
        self.condition, self.text = self.condition.clone(), self.text.clone()
        self.controls = [(net, embedding.clone(), weight) for net, embedding, weight in self.controls]
        for p in self.keys_and_values:
            p.output.value = p.output.value.clone()

    def key(self) -> tuple:
        """A key of all that a recording of this network depends on, except for the values of its constants."""
        nets = [(identity(net), weight) for net, _, weight in self.controls]
        shapes = [(tuple(x.shape), x.dtype) for x in self.constants]
        return identity(self.unet), *nets, *shapes, self.prepare is compile_once

    def run(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Run UNet and ControlNets on latents ``z`` B x C x h x w, repeated to as many rows as ``t`` has."""
        dtype = self.unet.conv_in.weight.dtype
        u = torch.cat([z, self.condition], 1).repeat(len(t) // len(z), 1, 1, 1).to(dtype)
        self.first_halves[len(t)] = self.encode(u, t, self.text[-len(t) :].to(dtype))
        return self.decode(*self.first_halves[len(t)]).to(z.dtype)

    def run_second_half(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Run the UNet's second half on the ``first_halves`` of an earlier step, with the current timesteps."""
        activations, residuals = self.first_halves[len(t)]
        time = embed_time(self.unet, t, activations.middle.dtype)
        return self.decode(replace(activations, time=time), residuals).to(z.dtype)

    def decode(self, activations: Activations, residuals: Residuals | None) -> torch.Tensor:
        """The output of the UNet's second half."""
        text = self.text[-len(activations.middle) :].to(activations.middle.dtype)
        return self.prepare(decode)(self.unet, activations, text, residuals)

    def encode(self, u: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> tuple[Activations, Residuals | None]:
        """The UNet's first half, and the sum of the ControlNets' residuals."""
        controls = [(net, embedding[-len(u) :], weight) for net, embedding, weight in self.controls]
        jobs = [functools.partial(run_control, control, u, t, text, self.prepare(residuals)) for control in controls]
        jobs.insert(0, functools.partial(self.prepare(encode), self.unet, u, t, text))
        activations, *results = run_concurrently(jobs, u.device)
        return activations, functools.reduce(add_residuals, results) if results else None


@functools.cache
def compile_once(function: Callable) -> Callable:
    """Compile ``function`` of a network, one graph for each call; networks of one architecture share it."""
    return torch.compile(function, fullgraph=True, dynamic=False)


class GuidedModel:
    """The eps model of one batch, a function of (z_t, t), with classifier-free guidance e_u + w (e_c - e_u).

    Both halves run in one pass, with the ControlNets on both; w = 1 runs only the conditional half. Guidance of v
    equals guidance of eps, because for one z the two differ by an affine map. Each call is one step of the sampler.
    """

    def __init__(
        self,
        backbone: Backbone,
        condition: torch.Tensor,
        text: torch.Tensor,
        empty_text: torch.Tensor,
        schedule: Schedule,
        controls: Sequence[Control] = (),
    ):
        if schedule.graphs and backbone.device.type != "cuda":
            raise UserError(
                f"graphs=true records what a GPU does, and the backbone is on the {backbone.device.type}: leave it out"
            )
        self.backbone, self.schedule, self.calls, self.rows = backbone, schedule, 0, 0
        rows = torch.cat([empty_text.expand_as(text), text]) if self.is_guided(0) else text
        halves = len(rows) // len(text)
        controls = [(net, e.repeat(halves, 1, 1, 1), weight) for net, e, weight in embed_hints(controls)]
        self.network = Network(backbone.unet, condition, rows, controls, schedule.compile)
        self.recording = get_recording(self.network.key(), self.network) if schedule.graphs else None

    def is_guided(self, call: int) -> bool:
        """Whether guidance is used in this call."""
        return self.schedule.guidance != 1 and call < self.schedule.guided * self.schedule.steps

    def cache_text(self) -> AbstractContextManager[None]:
        """Within this block the networks use the cached keys and values of their text."""
        network = self.recording.network if self.recording else self.network
        return cached_cross_attention(network.keys_and_values)

    def __call__(self, z: torch.Tensor, t: int) -> torch.Tensor:
        guided, w = self.is_guided(self.calls), self.schedule.guidance
        rows = len(z) * (1 + guided)
        output = self.output(z, torch.full((rows,), t, device=z.device, dtype=torch.long), rows)
        self.calls += 1
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + w * (conditional - unconditional)
        return to_eps(self.backbone.prediction_type, output, z, level(self.backbone.alphas_cumprod, t).to(z.dtype))

    def output(self, z: torch.Tensor, t: torch.Tensor, rows: int) -> torch.Tensor:
        """The UNet's output for ``rows`` rows, the conditional ones last."""
        is_whole = self.calls % self.schedule.encoder_every == 0 or rows != self.rows
        self.rows = rows
        if self.recording:
            return self.recording(z, t, is_whole)
        return self.network.run(z, t) if is_whole else self.network.run_second_half(z, t)


@torch.no_grad()
def sample_latents(
    backbone: Backbone,
    noise: torch.Tensor,
    condition: torch.Tensor,
    text: torch.Tensor,
    empty_text: torch.Tensor,
    schedule: Schedule,
    controls: Sequence[Control] = (),
) -> torch.Tensor:
    """Sample a clean latent B x C x h x w from pure ``noise``; for ``condition`` see ``predict``."""
    eps = GuidedModel(backbone, condition, text, empty_text, schedule, controls)
    with eps.cache_text():
        if schedule.solver == "ddim":
            return sample(eps, noise, schedule.steps, backbone.alphas_cumprod, backbone.scheduler.config.steps_offset)
        solver = getattr(diffusers, SOLVERS[schedule.solver])
        # the model returns eps for any backbone
        solver = solver.from_config(backbone.scheduler.config, prediction_type="epsilon")
        solver.set_timesteps(schedule.steps)
        z = noise
        for t in solver.timesteps:
            z = solver.step(eps(z, int(t)), t, z, return_dict=False)[0]
        return z


def inpaint(
    backbone: Backbone,
    noise: torch.Tensor,
    hole: torch.Tensor,
    masked: torch.Tensor,
    text: torch.Tensor,
    empty_text: torch.Tensor,
    schedule: Schedule = Schedule(),
    controls: Sequence[Control] = (),
) -> torch.Tensor:
    """Inpaint: sample a clean latent B x C x h x w from pure ``noise``.

    ``hole`` B x 1 x h x w in {0, 1}, ``masked`` the scaled latent of the masked image, ``text`` B x T x D,
    ``empty_text`` 1 x T x D. Channel order of Stable Diffusion inpainting: latent, mask, masked latent.
    """
    return sample_latents(backbone, noise, torch.cat([hole, masked], 1), text, empty_text, schedule, controls)


@torch.no_grad()
def predict_mean(
    backbone: Backbone,
    noise: torch.Tensor,
    hole: torch.Tensor,
    masked: torch.Tensor,
    text: torch.Tensor,
    empty_text: torch.Tensor,
    schedule: Schedule = Schedule(),
    controls: Sequence[Control] = (),
) -> torch.Tensor:
    """Predict the mean of all clean latents that ``inpaint`` may sample, B x C x h x w, in one evaluation.

    At the last timestep almost nothing of the latent is left in the noise, so that the clean latent predicted there is
    the mean over what may stand in the hole. Arguments are those of ``inpaint``. The noise and its negative are
    averaged, which cancels what the prediction keeps of them.
    """
    latents, rows = torch.cat([noise, -noise]), torch.cat([hole, masked], 1).repeat(2, 1, 1, 1)
    twice = [(net, hint.repeat(2, 1, 1, 1), weight) for net, hint, weight in controls]
    eps = GuidedModel(backbone, rows, text.repeat(2, 1, 1), empty_text, schedule, twice)
    t = len(backbone.alphas_cumprod) - 1
    a = level(backbone.alphas_cumprod, t).to(latents.dtype)
    with eps.cache_text():
        clean = clean_latent(latents, eps(latents, t), a)
    return torch.stack(clean.chunk(2)).mean(0)


@dataclass(frozen=True)
class Settings(Schedule):
    """How pictures are sampled: a schedule, and ``batch``, the pictures that are sampled at once."""

    batch: int = 16
