"""Text to image: an inpainting UNet whose hole is the whole picture, or a UNet without a mask."""

from collections.abc import Sequence

import numpy as np
import torch

from harmony.models.backbone import Backbone
from harmony.pixels.images import from_model
from harmony.sampling.ddim import noise_for
from harmony.sampling.guidance import Settings, sample_latents


def full_hole_condition(backbone: Backbone, count: int = 1) -> torch.Tensor:
    """The condition of an inpainting UNet for a hole of the whole picture, count x (1 + C) x h x w.

    A UNet without a mask gets no channels.
    """
    side = backbone.resolution // backbone.factor
    if backbone.unet.config.in_channels == backbone.channels:
        return torch.zeros(count, 0, side, side, device=backbone.device)
    gray = torch.zeros(1, 3, backbone.resolution, backbone.resolution, device=backbone.device)
    condition = torch.cat(
        [torch.ones(1, 1, side, side, device=backbone.device), backbone.latent(backbone.moments(gray))], 1
    )
    return condition.expand(count, -1, -1, -1)


@torch.no_grad()
def text_to_image(
    backbone: Backbone, text: torch.Tensor, settings: Settings, seeds: Sequence[tuple[int, int]]
) -> list[np.ndarray]:
    """Pictures uint8 R x R x 3 of text states B x T x D; the noise of each depends on its (seed, index)."""
    side = backbone.resolution // backbone.factor
    noise = noise_for(seeds, (backbone.channels, side, side), backbone.device)
    z = sample_latents(backbone, noise, full_hole_condition(backbone, len(text)), text, backbone.prompt([""]), settings)
    return list(from_model(backbone.decode(z)))
