"""Text to image: an inpainting UNet whose hole is the whole picture, or one without a mask."""

from collections.abc import Sequence

import numpy as np
import torch

from harmony.models.backbone import Kit
from harmony.pixels.images import from_model
from harmony.sampling.ddim import noise_for
from harmony.sampling.guidance import Settings, sampled


def whole_picture(kit: Kit, count: int = 1) -> torch.Tensor:
    """What an inpainting UNet knows when all is hole, count x (1 + C) x h x w; no channels for one without a mask."""
    side = kit.resolution // kit.factor
    if kit.unet.config.in_channels == kit.channels:
        return torch.zeros(count, 0, side, side, device=kit.device)
    grey = torch.zeros(1, 3, kit.resolution, kit.resolution, device=kit.device)
    known = torch.cat([torch.ones(1, 1, side, side, device=kit.device), kit.latent(kit.moments(grey))], 1)
    return known.expand(count, -1, -1, -1)


@torch.no_grad()
def text_to_image(
    kit: Kit, text: torch.Tensor, settings: Settings, seeds: Sequence[tuple[int, int]]
) -> list[np.ndarray]:
    """Pictures uint8 R x R x 3 of text states B x T x D; the noise of each depends on its (seed, index)."""
    side = kit.resolution // kit.factor
    noise = noise_for(seeds, (kit.channels, side, side), kit.device)
    z = sampled(kit, noise, whole_picture(kit, len(text)), text, kit.prompt([""]), settings)
    return list(from_model(kit.decode(z)))
