"""F3. Inpainting by words and ControlNets: the nine-channel UNet with guidance and a weighted sum of residuals.

Corrected eq. 7 of the method sheet (2.6): skip_i <- skip_i + sum_k lambda_k r_i^(k), the same for the middle block. A
net whose weight is 0 is not run at all, so that all weights 0 is plain inpainting exactly.
"""

from collections.abc import Sequence

import torch

from harmony.models.kit import Kit
from harmony.sampling.ddim import Eps, level, sample, to_eps

Control = tuple[torch.nn.Module, torch.Tensor, float]  # ControlNet, hint B x 3 x H x W in [0, 1], weight


def control_residuals(
    controls: Sequence[Control], z: torch.Tensor, t: torch.Tensor, text: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...] | None, torch.Tensor | None]:
    """(down residuals, middle residual) summed with their weights; (None, None) when no net has weight."""
    down, middle = None, None
    for net, hint, weight in controls:
        if weight == 0:
            continue
        u = z[:, : net.config.in_channels]
        r, m = net(u, t, text, hint, conditioning_scale=weight, return_dict=False)
        down = r if down is None else [a + b for a, b in zip(down, r, strict=True)]
        middle = m if middle is None else middle + m
    return (None if down is None else tuple(down)), middle


def predict(
    unet: torch.nn.Module,
    z: torch.Tensor,
    known: torch.Tensor,
    t: torch.Tensor,
    text: torch.Tensor,
    controls: Sequence[Control] = (),
) -> torch.Tensor:
    """The UNet's output (eps, or v for a kit that predicts it), B x C x h x w.

    ``known`` = [hole, masked latent] is B x (1 + C) x h x w.
    """
    u = torch.cat([z, known], 1)
    down, middle = control_residuals(controls, u, t, text)
    return unet(
        u,
        t,
        text,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
        return_dict=False,
    )[0]


def guided(kit: Kit, known: torch.Tensor, text: torch.Tensor, empty: torch.Tensor, w: float, controls=()) -> Eps:
    """Classifier-free guidance e_u + w (e_c - e_u), both halves in one batch, ControlNets on both; w = 1 runs one.

    Guidance of v is guidance of eps: for one z the two differ by an affine map.
    """
    empty, kind = empty.expand_as(text), kit.prediction_type

    def eps(z: torch.Tensor, t: int) -> torch.Tensor:
        return to_eps(kind, output(z, t), z, level(kit.alphas_cumprod, t).to(z.dtype))

    def output(z: torch.Tensor, t: int) -> torch.Tensor:
        t = torch.full((1,), t, device=z.device, dtype=torch.long)
        if w == 1:
            return predict(kit.unet, z, known, t.expand(len(z)), text, controls)
        doubled = [(net, torch.cat([hint, hint]), weight) for net, hint, weight in controls]
        both = torch.cat([empty, text])
        e = predict(kit.unet, torch.cat([z, z]), torch.cat([known, known]), t.expand(2 * len(z)), both, doubled)
        e_u, e_c = e.chunk(2)
        return e_u + w * (e_c - e_u)

    return eps


@torch.no_grad()
def inpaint(
    kit: Kit,
    noise: torch.Tensor,
    hole: torch.Tensor,
    masked: torch.Tensor,
    text: torch.Tensor,
    empty: torch.Tensor,
    guidance: float = 7.5,
    steps: int = 50,
    controls: Sequence[Control] = (),
) -> torch.Tensor:
    """Clean latent B x C x h x w from pure noise.

    ``hole`` B x 1 x h x w in {0, 1}, ``masked`` the scaled latent of the masked image, ``text`` B x T x D, ``empty``
    1 x T x D. Channel order of Stable Diffusion inpainting: latent, mask, masked latent.
    """
    eps = guided(kit, torch.cat([hole, masked], 1), text, empty, guidance, controls)
    return sample(eps, noise, steps, kit.alphas_cumprod, kit.scheduler.config.steps_offset)
