"""The objective of a latent diffusion model: noisy latents, their targets, and the weights of the loss."""

from dataclasses import dataclass

import torch

from harmony.models.backbone import scaled_latent

NOISIEST = 50  # timesteps at the end, where a latent says next to nothing about its picture


def add_noise(
    batch: dict[str, torch.Tensor], scale: float, abar: torch.Tensor, t_min: int = 0, noisiest: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add noise to a cached batch: (z_t, condition, t), z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps.

    t B is uniform in t_min .. 999, a share ``noisiest`` of it in the last NOISIEST timesteps; z_t is B x C x h x w; the
    condition [hole, masked latent] is B x (1 + C) x h x w, in the channel order of SD inpainting.
    """
    t = draw_timesteps(batch["time"], len(abar), t_min, noisiest)
    a = abar[t].view(-1, 1, 1, 1)
    z = a.sqrt() * scaled_latent(batch["moments"], scale, batch["encode"]) + (1 - a).sqrt() * batch["noise"]
    masked = scaled_latent(batch["masked_moments"], scale, batch["encode_masked"])
    return z, torch.cat([batch["hole"], masked], 1), t


def draw_timesteps(time: torch.Tensor, count: int, t_min: int, noisiest: float) -> torch.Tensor:
    """Timesteps, int64, of ``time`` uniform in [0, 1): see ``add_noise``; ``count`` of them exist."""
    is_last = time < noisiest
    start = torch.where(is_last, count - NOISIEST, t_min)
    share = torch.where(is_last, time / max(noisiest, 1e-12), (time - noisiest) / max(1 - noisiest, 1e-12))
    return (start + (share * (count - start)).long()).clamp(max=count - 1)


def compute_target(kind: str, z: torch.Tensor, noise: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The target of the network's output for z_t, B x C x h x w: eps, or v = (eps - sqrt(1 - a) z_t) / sqrt(a).

    v equals sqrt(a) eps - sqrt(1 - a) x0. a = abar_t, B.
    """
    if kind == "epsilon":
        return noise
    a = a.view(-1, 1, 1, 1)
    return (noise - (1 - a).sqrt() * z) / a.sqrt()


@dataclass(frozen=True)
class Objective:
    """Weights of the squared error of the network's output; the defaults are Liu 2025, eq. 8 (all 1).

    ``weighting``: ``plain`` (1) or ``x0``, the weight (1 - abar) / abar clipped to ``clip``, which turns the error of
    eps into that of the clean latent where it is not clipped. Color is decided at high noise, where the plain loss has
    little gradient, so that this weight needs far fewer steps. For a network that predicts v the same weight is
    1 - abar, without a clip.
    ``t_min``: smallest timestep. ``noisiest``: share of the samples at the last timesteps. ``inside``: extra weight of
    latent cells that the instance covers; the weights of an image are normalized to mean 1, so that the scale of the
    loss does not depend on the size of the instance.
    """

    weighting: str = "plain"
    clip: tuple[float, float] = (0.2, 5.0)
    t_min: int = 0
    noisiest: float = 0.0
    inside: float = 0.0

    def compute_weight(self, abar_t: torch.Tensor, coverage: torch.Tensor, kind: str = "epsilon") -> torch.Tensor:
        """Weights B x 1 x h x w; ``coverage`` B x 1 x h x w in [0, 1], ``kind`` the prediction type, abar_t B."""
        space = 1 + self.inside * coverage
        space = space / space.mean((1, 2, 3), keepdim=True)
        if self.weighting == "plain":
            return space
        if kind == "v_prediction":
            return space * (1 - abar_t).view(-1, 1, 1, 1)
        return space * ((1 - abar_t) / abar_t).clamp(*self.clip).view(-1, 1, 1, 1)
