"""Inpainting by a caption and ControlNets (Liu 2025): color and structure hints on a frozen backbone."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from harmony.core.errors import UserError
from harmony.methods.method import CAPTION, Composite, Method, Seed, fingerprint
from harmony.models.backbone import DIFFUSION, Backbone, move_module, weights_hash
from harmony.models.controlnet import load_controlnet, net_hash, read_hint, to_cells
from harmony.models.shipped import CONTROLNET, fetch_weights
from harmony.models.timing import blocks
from harmony.pixels.hints import HINTS, hint
from harmony.pixels.images import from_model, to_hint, to_model
from harmony.pixels.masks import to_latent
from harmony.sampling.ddim import noise_for
from harmony.sampling.guidance import Settings, inpaint, predict_mean


@dataclass(frozen=True)
class Branch:
    """A trained ControlNet with its hint operator: ``name`` is color, structure or raw; ``weight`` is its lambda.

    ``source``: sha256 of the files that it was read from; None for a net that is only in memory.
    """

    name: str
    net: torch.nn.Module
    weight: float = 1.0
    parameters: dict | None = None
    source: str | None = None

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.name, self.weight, self.parameters, self.source or weights_hash(self.net))


def load_branch(
    path: str, backbone: Backbone, weights: Mapping[str, float] | None = None, operator: str | None = None
) -> Branch:
    """The ControlNet in ``path`` with its operator from ``hint.json``; ``weights``: operator -> lambda (default 1).

    ``operator``: that of a ControlNet without ``hint.json``. UserError for an unknown operator, and for a net that does
    not fit the architecture of the backbone. A net is loaded once for each backbone.
    """
    key = (str(path), operator)
    if key not in backbone.attachments:
        backbone.attachments[key] = read_branch(path, backbone, operator)
    branch = backbone.attachments[key]
    return replace(branch, weight=(weights or {}).get(branch.name, 1.0))


def read_branch(path: str, backbone: Backbone, operator: str | None) -> Branch:
    """Load a ControlNet, check that it fits the backbone, and find its operator."""
    source = fetch_weights(CONTROLNET, path)
    net, facts = move_module(load_controlnet(source, backbone.dtype), backbone.device), read_hint(source)
    name = facts.get("branch", operator)
    if name not in HINTS:
        raise UserError(f"{path} does not say which hint it needs (hint.json): add branch={'|'.join(HINTS)}")
    for key in ("block_out_channels", "cross_attention_dim", "layers_per_block"):
        theirs, ours = net.config[key], backbone.unet.config[key]
        if list(np.atleast_1d(theirs)) != list(np.atleast_1d(ours)):
            origin = facts.get("backbone", "another backbone")
            raise UserError(
                f"{path}, trained on {origin}, does not fit backbone {backbone.name} ({key}): give its model.path"
            )
    parameters = facts.get("parameters")
    parameters = parameters and to_cells(parameters, backbone.resolution // backbone.factor)
    return Branch(name, net, 1.0, parameters, net_hash(source))


# (items of the batch, noise, hole B x 1 x h x w, scaled masked latent) -> clean latents B x C x h x w
Draw = Callable[[slice, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def fill_holes(
    backbone: Backbone, composites: Sequence[Composite], seeds: Sequence[Seed], draw: Draw, batch: int
) -> list[np.ndarray]:
    """Fill holes from noise and a masked latent: squares uint8 R x R x 3.

    ``draw`` computes the clean latents of ``batch`` composites at a time.
    """
    side = backbone.resolution // backbone.factor
    outputs = []
    for i in range(0, len(composites), batch):
        part = slice(i, i + batch)
        x = torch.stack([to_model(c.background) for c in composites[part]]).to(backbone.device)
        holes = torch.from_numpy(np.stack([c.hole for c in composites[part]])[:, None]).float().to(backbone.device)
        masked = backbone.latent(backbone.moments(x * (1 - holes)))
        noise = noise_for(seeds[part], (backbone.channels, side, side), backbone.device)
        z = draw(part, noise, to_latent(holes, backbone.factor), masked)
        outputs += [from_model(y) for y in backbone.decode(z).float()]
    return outputs


@torch.no_grad()
def encode_and_decode(backbone: Backbone, composites: Sequence[Composite], batch: int) -> list[np.ndarray]:
    """The composites by copy and paste through the autoencoder, squares uint8 R x R x 3."""
    outputs = []
    for i in range(0, len(composites), batch):
        x = to_model(np.stack([c.copy_paste() for c in composites[i : i + batch]])).to(backbone.device)
        outputs += list(from_model(backbone.decode(backbone.latent(backbone.moments(x))).float()))
    return outputs


def draw_hints(branch: Branch, composites: Sequence[Composite], cell: int) -> list[np.ndarray]:
    """The hint of each composite by the branch's operator, uint8 R x R x 3; ``cell``: pixels of a latent cell."""
    return [
        hint(branch.name, c.instance, c.mask, c.background, c.hole, cell=cell, **(branch.parameters or {}))
        for c in composites
    ]


def average_mirrored(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The means of pictures, uint8 R x R x 3, and of those of the mirrored squares behind them."""
    count = len(pictures) // 2
    halves = zip(pictures[:count], pictures[count:], strict=True)
    return [np.rint((a.astype(np.float32) + b[:, ::-1]) / 2).astype(np.uint8) for a, b in halves]


class Inpainting(Method):
    """Inpainting by the caption and the ControlNets of ``branches``; by the caption alone where their weights are 0."""

    wants = frozenset({CAPTION})

    def __init__(self, backbone: Backbone, branches: Sequence[Branch] = (), settings: Settings = Settings()):
        self.backbone, self.branches, self.settings = backbone, list(branches), settings
        self.resolution, self.device = backbone.resolution, backbone.device

    @functools.cached_property
    def fingerprint(self) -> str:
        parts = {part: self.backbone.hash(part) for part in DIFFUSION}
        nets = [branch.fingerprint for branch in self.branches if branch.weight != 0]
        return fingerprint("inpainting", parts, str(self.backbone.dtype), nets, self.settings)

    def fill(self, composites: Sequence[Composite], seeds: Sequence[Seed]) -> list[np.ndarray]:
        return self.run(inpaint, composites, seeds)

    def run(
        self, sampler: Callable[..., torch.Tensor], composites: Sequence[Composite], seeds: Sequence[Seed]
    ) -> list[np.ndarray]:
        """Fill the holes by ``inpaint`` or ``predict_mean``."""
        backbone, empty_text = self.backbone, self.backbone.prompt([""])

        def draw(part: slice, noise: torch.Tensor, hole: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
            controls = []
            for b in self.branches:
                hints = torch.stack(
                    [to_hint(picture) for picture in draw_hints(b, composites[part], self.backbone.factor)]
                )
                controls.append((b.net, hints.to(backbone.device), b.weight))
            text = backbone.prompt([c.caption for c in composites[part]])
            return sampler(backbone, noise, hole, masked, text, empty_text, self.settings, controls)

        return fill_holes(backbone, composites, seeds, draw, self.settings.batch)

    @property
    def relights(self) -> bool:
        """A hint shows the object, which then keeps its place and shape; words alone paint another one."""
        return any(branch.weight != 0 for branch in self.branches)

    def relight(self, composites: Sequence[Composite], seeds: Sequence[Seed]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The composites through the autoencoder, and the mean of what the networks may paint (``predict_mean``).

        The mean has no texture but the most probable light, which no further step improves. Each is averaged with that
        of the mirrored square, which errs in other ways.
        """
        both = [*composites, *(c.mirror() for c in composites)]
        before = encode_and_decode(self.backbone, both, self.settings.batch)
        after = self.run(predict_mean, both, [*seeds, *seeds])
        return list(zip(*(average_mirrored(pictures) for pictures in (before, after)), strict=True))

    def describe(self) -> str:
        nets = " and ".join(f"{b.name} (weight {b.weight:g})" for b in self.branches)
        where = f"backbone {self.backbone.name} at {self.resolution} px on {self.device.type}"
        return f"{where}, {nets or 'no ControlNet, plain inpainting'}"

    def views(self, composites: Sequence[Composite]) -> dict[str, list[np.ndarray]]:
        titles = [f"hint {b.name}" for b in self.branches] if len(self.branches) > 1 else ["hint"]
        cell = self.backbone.factor
        return {title: draw_hints(b, composites, cell) for title, b in zip(titles, self.branches, strict=False)}

    def networks(self) -> dict[str, list[torch.nn.Module]]:
        vae = self.backbone.vae
        return {
            "UNet": blocks(self.backbone.unet),
            **{f"{b.name} ControlNet": blocks(b.net) for b in self.branches},
            "VAE": [vae.encoder, vae.decoder],
            "text encoder": [self.backbone.text_encoder],
        }


def load(
    backbone: Backbone,
    controlnet: str | None = None,
    structure: str | None = None,
    branch: str | None = None,
    lambda_l: float = 1.0,
    lambda_h: float = 1.0,
    **sampling,
) -> Inpainting:
    """Build ``Inpainting`` from options, with up to two ControlNets.

    ``controlnet`` and ``structure``: each a run folder, a diffusers folder, a hub id or a shipped name. ``lambda_l``
    weights color and raw, ``lambda_h`` structure. ``branch``: the operator of ``controlnet`` where it has no
    ``hint.json``. ``sampling``: fields of ``Settings``.
    """
    for name, value in (("lambda_l", lambda_l), ("lambda_h", lambda_h)):
        if type(value) not in (int, float):
            raise UserError(f"{name}={value}: give a number")
    weights = {"color": lambda_l, "structure": lambda_h, "raw": lambda_l}
    branches = [load_branch(controlnet, backbone, weights, branch)] if controlnet else []
    if structure:
        structure_branch = load_branch(structure, backbone, weights, "structure")
        if structure_branch.name != "structure" or any(b.name == "structure" for b in branches):
            raise UserError(f"structure={structure} sees {structure_branch.name}: give one ControlNet of each branch")
        branches.append(structure_branch)
    return Inpainting(backbone, branches, Settings(**sampling))
