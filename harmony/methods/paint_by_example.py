"""Sampling Paint by Example (Yang 2022): the exemplar's token in the place of words.

Sampled by DDIM as every method here, so that tables compare methods and not samplers; the released scripts use PLMS.
"""

from collections.abc import Sequence

import numpy as np
import torch

from harmony.methods.insert import filled
from harmony.models.paint_by_example import Painter, known_by_example
from harmony.pixels.images import to_hint
from harmony.sampling.guidance import Schedule, Settings, sampled


@torch.no_grad()
def paint(
    painter: Painter,
    noise: torch.Tensor,
    hole: torch.Tensor,
    masked: torch.Tensor,
    context: torch.Tensor,
    schedule: Schedule = Schedule(guidance=5.0),
) -> torch.Tensor:
    """Clean latent B x C x h x w from pure noise by e(v) + s (e(c) - e(v)), s the guidance.

    ``hole`` B x 1 x h x w in {0, 1} (1 = paint), ``masked`` the scaled latent of the masked image, ``context``
    B x T x D of the exemplars.
    """
    nothing = painter.encoder.uncond_vector
    return sampled(painter.kit, noise, known_by_example(hole, masked), context, nothing, schedule)


@torch.no_grad()
def fill_by_example(
    painter: Painter,
    images: Sequence[np.ndarray],
    exemplars: Sequence[np.ndarray],
    holes: Sequence[np.ndarray],
    settings: Settings,
    indices: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Raw outputs, uint8 R x R x 3: what ``exemplars`` (uint8 S x S x 3) show, painted into the holes of ``images``."""
    kit = painter.kit

    def draw(part: slice, noise: torch.Tensor, hole: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        pictures = torch.stack([to_hint(e) for e in exemplars[part]]).to(kit.device)
        return paint(painter, noise, hole, masked, painter.encoder(pictures), settings)

    return filled(kit, images, holes, draw, settings, indices)
