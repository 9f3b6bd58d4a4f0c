"""What a latent diffusion model is trained on: the noised latent, and the weight of each entry of the eps loss."""

from dataclasses import dataclass

import torch

from harmony.models.backbone import scaled_latent


def noised(
    batch: dict, scale: float, abar: torch.Tensor, t_min: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(z_t, known, t) of a cached batch: z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps with t uniform in t_min .. 999.

    z_t is B x C x h x w; known = [hole, masked latent] is B x (1 + C) x h x w, the channel order of SD inpainting; t is
    B.
    """
    t = t_min + (batch["time"] * (len(abar) - t_min)).long().clamp(max=len(abar) - t_min - 1)
    a = abar[t].view(-1, 1, 1, 1)
    z = a.sqrt() * scaled_latent(batch["moments"], scale, batch["encode"]) + (1 - a).sqrt() * batch["noise"]
    masked = scaled_latent(batch["masked_moments"], scale, batch["encode_masked"])
    return z, torch.cat([batch["hole"], masked], 1), t


def target(kind: str, z: torch.Tensor, noise: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """What the network should put out for z_t, B x C x h x w: eps, or v = (eps - sqrt(1 - a) z_t) / sqrt(a).

    The latter equals sqrt(a) eps - sqrt(1 - a) x0. a = abar_t, B.
    """
    if kind == "epsilon":
        return noise
    a = a.view(-1, 1, 1, 1)
    return (noise - (1 - a).sqrt() * z) / a.sqrt()


@dataclass(frozen=True)
class Objective:
    """Weights of the squared error of the network's output; the defaults are Liu 2025, eq. 8 (all 1).

    ``weighting``: ``plain`` (1) or ``x0``, the weight (1 - abar) / abar clipped to ``clip``, which turns the eps error
    into that of the predicted clean latent where it is not clipped: colour is decided at high noise, and the plain loss
    spends its gradient elsewhere (minutes of training with this weight show what the plain loss does not begin to). For
    a network that predicts v the same is the weight 1 - abar, and no clip is needed.
    ``t_min``: smallest timestep. ``inside``: extra weight of latent cells that the instance covers; the weights of an
    image are normalised to mean 1, so that the scale of the loss does not depend on the size of the instance.
    """

    weighting: str = "plain"
    clip: tuple[float, float] = (0.2, 5.0)
    t_min: int = 0
    inside: float = 0.0

    def weight(self, abar_t: torch.Tensor, covered: torch.Tensor, kind: str = "epsilon") -> torch.Tensor:
        """abar_t B, covered B x 1 x h x w in [0, 1], ``kind`` of output -> B x 1 x h x w."""
        space = 1 + self.inside * covered
        space = space / space.mean((1, 2, 3), keepdim=True)
        if self.weighting == "plain":
            return space
        if kind == "v_prediction":
            return space * (1 - abar_t).view(-1, 1, 1, 1)
        return space * ((1 - abar_t) / abar_t).clamp(*self.clip).view(-1, 1, 1, 1)
