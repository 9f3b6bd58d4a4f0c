"""Inpainting by words and ControlNets: the nine-channel UNet with guidance and a weighted sum of residuals.

Liu 2025, eq. 7 with the names of its two branches put right: skip_i <- skip_i + sum_k lambda_k r_i^(k), the same for
the middle block. A net whose weight is 0 is not run at all, so that all weights 0 is plain inpainting exactly. What
does not change from step to step, a hint's embedding and the keys and values of the words, is computed once.
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
from harmony.models.unet_halves import Encoded, Residuals, decode, encode, residuals, time_of
from harmony.sampling.cuda_graphs import identity, recording_of, side_by_side
from harmony.sampling.ddim import level, sample, to_eps

Control = tuple[torch.nn.Module, torch.Tensor, float]  # ControlNet, hint B x 3 x H x W in [0, 1], weight
SOLVERS = {"ddim": "DDIMScheduler", "dpmsolver++": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}


@dataclass(frozen=True)
class Schedule:
    """How a batch is sampled: ``steps`` of a ``solver`` with ``guidance`` w; the rest makes it cheaper and near-exact.

    ``guided``: the share of the steps, from the noisiest on, that are guided. ``encoder_every``: the ControlNets and
    the first half of the UNet run in every n-th step, and the steps between take over their activations (encoder
    propagation; Li 2023, Faster Diffusion). ``graphs``: what a step computes is recorded as a CUDA graph, once
    a shape, and replayed: the same numbers, without the launch of each kernel. ``compile``: both halves of the UNet and
    the ControlNets are compiled, which takes minutes once and changes numbers by rounding alone. UserError for values
    that mean nothing.
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


def embedded(controls: Sequence[Control]) -> list[Control]:
    """The nets that have weight, each with what its hint encoder makes of the hint in the place of the hint."""
    return [
        (net, net.controlnet_cond_embedding(hint.to(net.conv_in.weight.dtype)), weight)
        for net, hint, weight in controls
        if weight != 0
    ]


def added_by(
    control: Control, z: torch.Tensor, t: torch.Tensor, text: torch.Tensor, run: Callable[..., Residuals] = residuals
) -> Residuals:
    """The weighted residuals of one ``embedded`` net, which reads the channels of ``z`` that it was made for."""
    net, embedding, weight = control
    dtype = net.conv_in.weight.dtype
    down, middle = run(net, z[:, : net.config.in_channels].to(dtype), t, text.to(dtype), embedding)
    return tuple((weight * r).to(z.dtype) for r in down), (weight * middle).to(z.dtype)


def together(a: Residuals, b: Residuals) -> Residuals:
    """The sum of two ControlNets' residuals."""
    return tuple(x + y for x, y in zip(a[0], b[0], strict=True)), a[1] + b[1]


def control_residuals(
    controls: Sequence[Control], z: torch.Tensor, t: torch.Tensor, text: torch.Tensor
) -> Residuals | None:
    """Residuals of ``embedded`` nets, summed with their weights; None of none."""
    found = [added_by(control, z, t, text) for control in controls]
    return functools.reduce(together, found) if found else None


def predict(
    unet: torch.nn.Module, z: torch.Tensor, known: torch.Tensor, t: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """The UNet's output (eps, or v for a backbone that predicts it), B x C x h x w, of the latent's dtype.

    ``known`` = [hole, masked latent] is B x (1 + C) x h x w.
    """
    dtype = unet.conv_in.weight.dtype
    return unet(torch.cat([z, known], 1).to(dtype), t, text.to(dtype), return_dict=False)[0].to(z.dtype)


class Network:
    """UNet and ControlNets with what stays the same over the steps of a batch: what one step computes.

    ``known`` B x (1 + C) x h x w; ``text`` rows x T x D, the conditional half last; ``controls`` ``embedded`` for as
    many rows. ``keys_and_values`` of the text are computed once.
    """

    def __init__(
        self, unet: torch.nn.Module, known: torch.Tensor, text: torch.Tensor, controls: list[Control], compiled: bool
    ):
        self.unet, self.known, self.text, self.controls = unet, known, text, controls
        self.keys_and_values = keys_and_values([unet, *(net for net, _, _ in controls)], text)
        self.run = compiled_once if compiled else lambda function: function
        self.first: dict[int, tuple[Encoded, Residuals | None]] = {}  # rows -> what lies before the second half

    @property
    def constants(self) -> list[torch.Tensor]:
        embeddings = [embedding for _, embedding, _ in self.controls]
        return [self.known, self.text, *embeddings, *(p.output.value for p in self.keys_and_values)]

    def copy_constants(self) -> None:
        self.known, self.text = self.known.clone(), self.text.clone()
        self.controls = [(net, embedding.clone(), weight) for net, embedding, weight in self.controls]
        for p in self.keys_and_values:
            p.output.value = p.output.value.clone()

    def key(self) -> tuple:
        """What a recording of this network depends on beside the values of its constants."""
        nets = [(identity(net), weight) for net, _, weight in self.controls]
        shapes = [(tuple(x.shape), x.dtype) for x in self.constants]
        return identity(self.unet), *nets, *shapes, self.run is compiled_once

    def whole(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """All of the UNet, with the ControlNets, for ``t`` rows of latents ``z`` B x C x h x w."""
        dtype = self.unet.conv_in.weight.dtype
        u = torch.cat([z, self.known], 1).repeat(len(t) // len(z), 1, 1, 1).to(dtype)
        self.first[len(t)] = self.encoded(u, t, self.text[-len(t) :].to(dtype))
        return self.decoded(*self.first[len(t)]).to(z.dtype)

    def second_half(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The UNet's second half behind the ``first`` of an earlier step, at its own time."""
        encoded, added = self.first[len(t)]
        time = time_of(self.unet, t, encoded.middle.dtype)
        return self.decoded(replace(encoded, time=time), added).to(z.dtype)

    def decoded(self, encoded: Encoded, added: Residuals | None) -> torch.Tensor:
        text = self.text[-len(encoded.middle) :].to(encoded.middle.dtype)
        return self.run(decode)(self.unet, encoded, text, added)

    def encoded(self, u: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> tuple[Encoded, Residuals | None]:
        """All that lies before the UNet's second half."""
        controls = [(net, embedding[-len(u) :], weight) for net, embedding, weight in self.controls]
        jobs = [functools.partial(added_by, control, u, t, text, self.run(residuals)) for control in controls]
        jobs.insert(0, functools.partial(self.run(encode), self.unet, u, t, text))
        encoded, *results = side_by_side(jobs, u.device)
        return encoded, functools.reduce(together, results) if results else None


@functools.cache
def compiled_once(function: Callable) -> Callable:
    """``function`` of a network compiled, one graph a call; networks of one architecture share it."""
    return torch.compile(function, fullgraph=True, dynamic=False)


class Guided:
    """eps of (z_t, t) for one batch: classifier-free guidance e_u + w (e_c - e_u), both halves in one pass, ControlNets
    on both; w = 1 runs one half.

    Guidance of v is guidance of eps: for one z the two differ by an affine map. A call is a step of the sampler.
    """

    def __init__(
        self,
        backbone: Backbone,
        known: torch.Tensor,
        text: torch.Tensor,
        empty: torch.Tensor,
        schedule: Schedule,
        controls: Sequence[Control] = (),
    ):
        if schedule.graphs and backbone.device.type != "cuda":
            raise UserError(
                f"graphs=true records what a GPU does, and the backbone is on the {backbone.device.type}: leave it out"
            )
        self.backbone, self.schedule, self.calls, self.rows = backbone, schedule, 0, 0
        rows = torch.cat([empty.expand_as(text), text]) if self.guides(0) else text
        halves = len(rows) // len(text)
        controls = [(net, e.repeat(halves, 1, 1, 1), weight) for net, e, weight in embedded(controls)]
        self.network = Network(backbone.unet, known, rows, controls, schedule.compile)
        self.recording = recording_of(self.network.key(), self.network) if schedule.graphs else None

    def guides(self, call: int) -> bool:
        return self.schedule.guidance != 1 and call < self.schedule.guided * self.schedule.steps

    def ready(self) -> AbstractContextManager[None]:
        """While it lasts, the networks know the keys and values of their text."""
        network = self.recording.network if self.recording else self.network
        return cached_cross_attention(network.keys_and_values)

    def __call__(self, z: torch.Tensor, t: int) -> torch.Tensor:
        guided, w = self.guides(self.calls), self.schedule.guidance
        rows = len(z) * (1 + guided)
        output = self.output(z, torch.full((rows,), t, device=z.device, dtype=torch.long), rows)
        self.calls += 1
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + w * (conditional - unconditional)
        return to_eps(self.backbone.prediction_type, output, z, level(self.backbone.alphas_cumprod, t).to(z.dtype))

    def output(self, z: torch.Tensor, t: torch.Tensor, rows: int) -> torch.Tensor:
        """The UNet's output for ``rows`` rows, of which the last are conditional."""
        fresh = self.calls % self.schedule.encoder_every == 0 or rows != self.rows
        self.rows = rows
        if self.recording:
            return self.recording(z, t, fresh)
        return self.network.whole(z, t) if fresh else self.network.second_half(z, t)


@torch.no_grad()
def sampled(
    backbone: Backbone,
    noise: torch.Tensor,
    known: torch.Tensor,
    text: torch.Tensor,
    empty: torch.Tensor,
    schedule: Schedule,
    controls: Sequence[Control] = (),
) -> torch.Tensor:
    """Clean latent B x C x h x w from pure ``noise``; ``known`` is what the UNet sees beside it (see ``predict``)."""
    eps = Guided(backbone, known, text, empty, schedule, controls)
    with eps.ready():
        if schedule.solver == "ddim":
            return sample(eps, noise, schedule.steps, backbone.alphas_cumprod, backbone.scheduler.config.steps_offset)
        solver = getattr(diffusers, SOLVERS[schedule.solver])
        solver = solver.from_config(
            backbone.scheduler.config, prediction_type="epsilon"
        )  # which ``eps`` is, for any backbone
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
    empty: torch.Tensor,
    schedule: Schedule = Schedule(),
    controls: Sequence[Control] = (),
) -> torch.Tensor:
    """Clean latent B x C x h x w from pure noise.

    ``hole`` B x 1 x h x w in {0, 1}, ``masked`` the scaled latent of the masked image, ``text`` B x T x D, ``empty``
    1 x T x D. Channel order of Stable Diffusion inpainting: latent, mask, masked latent.
    """
    return sampled(backbone, noise, torch.cat([hole, masked], 1), text, empty, schedule, controls)


@dataclass(frozen=True)
class Settings(Schedule):
    """How pictures are sampled: a schedule, and ``batch`` of them at a time."""

    batch: int = 16
