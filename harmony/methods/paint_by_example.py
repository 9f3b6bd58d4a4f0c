"""Paint by Example (Yang 2022): fills holes by an exemplar's token in place of a prompt.

It samples by DDIM as all methods here, so that tables compare methods and not samplers; the released scripts use PLMS.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch

from harmony.core.errors import UserError
from harmony.methods.inpainting import fill_holes
from harmony.methods.method import EXEMPLAR, Composite, Method, Seed, fingerprint
from harmony.models.backbone import Backbone, weights_hash
from harmony.models.paint_by_example import Painter, join_condition, load_painter, painter_hash
from harmony.models.timing import blocks
from harmony.pixels.exemplars import exemplar
from harmony.pixels.images import to_hint
from harmony.sampling.guidance import Schedule, Settings, sample_latents


@torch.no_grad()
def paint(
    painter: Painter,
    noise: torch.Tensor,
    hole: torch.Tensor,
    masked: torch.Tensor,
    context: torch.Tensor,
    schedule: Schedule = Schedule(guidance=5.0),
) -> torch.Tensor:
    """Sample clean latents B x C x h x w from noise by e(v) + s (e(c) - e(v)), with s the guidance.

    ``hole`` B x 1 x h x w in {0, 1} (1 = paint), ``masked`` the scaled latent of the masked image, ``context``
    B x T x D of the exemplars.
    """
    empty_context = painter.encoder.uncond_vector
    return sample_latents(painter.backbone, noise, join_condition(hole, masked), context, empty_context, schedule)


class PaintByExample(Method):
    """Paints what a composite's exemplar shows into its hole; ``source``: sha256 of the files of the weights."""

    wants = frozenset({EXEMPLAR})

    def __init__(self, painter: Painter, settings: Settings = Settings(guidance=3.0), source: str | None = None):
        self.painter, self.settings, self.source = painter, settings, source
        self.resolution, self.device = painter.backbone.resolution, painter.backbone.device

    @functools.cached_property
    def fingerprint(self) -> str:
        backbone = self.painter.backbone
        weights = self.source or [weights_hash(net) for net in (backbone.unet, self.painter.encoder)]
        return fingerprint("paint_by_example", backbone.hash("vae"), str(backbone.dtype), weights, self.settings)

    def prepare_exemplars(self, composites: Sequence[Composite], side: int) -> list[np.ndarray]:
        """The exemplar of each composite as the encoder sees it, uint8 side x side x 3."""
        return [exemplar(c.exemplar, side) for c in composites]

    def fill(self, composites: Sequence[Composite], seeds: Sequence[Seed]) -> list[np.ndarray]:
        painter = self.painter

        def draw(part: slice, noise: torch.Tensor, hole: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
            pictures = self.prepare_exemplars(composites[part], painter.encoder.size)
            context = painter.encoder(torch.stack([to_hint(picture) for picture in pictures]).to(self.device))
            return paint(painter, noise, hole, masked, context, self.settings)

        return fill_holes(painter.backbone, composites, seeds, draw, self.settings.batch)

    def describe(self) -> str:
        where = f"{self.painter.backbone.name} at {self.resolution} px, {self.device.type}"
        return f"Paint by Example on {where}, guidance {self.settings.guidance:g}"

    def views(self, composites: Sequence[Composite]) -> dict[str, list[np.ndarray]]:
        return {"exemplar": self.prepare_exemplars(composites, self.painter.encoder.size)}

    def networks(self) -> dict[str, list[torch.nn.Module]]:
        vae = self.painter.backbone.vae
        return {
            "UNet": blocks(self.painter.backbone.unet),
            "exemplar encoder": [self.painter.encoder],
            "VAE": [vae.encoder, vae.decoder],
        }


def load(backbone: Backbone, painter: str, **sampling) -> PaintByExample:
    """Build ``PaintByExample`` from options; ``painter``: a run folder, a diffusers folder, a hub id or a shipped name.

    UserError for a painter of another resolution than ``backbone``.
    """
    key = ("painter", str(painter))
    if key not in backbone.attachments:
        backbone.attachments[key] = load_painter(painter, backbone)
    net = backbone.attachments[key]
    if net.backbone.resolution != backbone.resolution:
        sizes = f"{net.backbone.resolution} px, backbone {backbone.name} at {backbone.resolution}"
        raise UserError(f"painter={painter} works at {sizes}: give model.path={painter}")
    return PaintByExample(net, Settings(**sampling), painter_hash(painter))
