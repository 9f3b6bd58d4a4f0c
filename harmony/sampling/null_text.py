"""Null-text inversion: empty-prompt embeddings, one a step, under which guided sampling gives an image back.

Mokady 2022 (Null-text Inversion for Editing Real Images using Guided Diffusion Models, arXiv 2211.09794), Algorithm 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from harmony.models.backbone import Backbone
from harmony.sampling.ddim import level, step, timesteps, to_eps
from harmony.sampling.guidance import predict
from harmony.sampling.text_to_image import whole_picture

Denoiser = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]  # (z_t, t, text B x T x D) -> eps


def rate(i: int) -> float:
    """Adam's learning rate at step i, 0 = the noisiest."""
    return 1e-2 * (1 - i / 100)


def enough(i: int) -> float:
    """The squared distance that ends step i early."""
    return 1e-5 + 2e-5 * i


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of each of B latents, B."""
    return (a - b).square().mean((1, 2, 3))


@dataclass(frozen=True)
class Search:
    """How the embedding of step i of N is looked for: ``inner`` Adam steps (of i and N) at ``rate`` (of i), down on
    ``loss`` (of the latent reached and that of the trajectory, B each), until it is ``enough`` (of i).
    """

    inner: Callable[[int, int], int] = lambda i, n: 10
    rate: Callable[[int], float] = rate
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = distance
    enough: Callable[[int], float] = enough


def denoiser(backbone: Backbone) -> Denoiser:
    """The backbone as a text-to-image model without guidance; gradients flow to the text."""
    known = whole_picture(backbone)

    def eps(z: torch.Tensor, t: int, text: torch.Tensor) -> torch.Tensor:
        time = torch.full((len(z),), t, device=z.device, dtype=torch.long)
        output = predict(backbone.unet, z, known.expand(len(z), -1, -1, -1), time, text)
        return to_eps(backbone.prediction_type, output, z, level(backbone.alphas_cumprod, t).to(z.dtype))

    return eps


def null_texts(
    eps: Denoiser,
    trajectory: Sequence[torch.Tensor],
    texts: Sequence[torch.Tensor],
    empty: torch.Tensor,
    w: float,
    abar: torch.Tensor,
    offset: int = 1,
    search: Search = Search(),
    say: Callable[[str], None] = lambda line: None,
) -> list[torch.Tensor]:
    """N embeddings B x T x D, noisiest step first, each begun from the one before and improved by ``search``.

    ``trajectory`` z_0 .. z_N (B x C x h x w each) is that of ``ddim.invert`` without guidance; ``texts``, B x T x D for
    each step, are what the picture is described by; ``empty`` 1 x T x D is the empty prompt's. At step i they minimise
    the loss between the guided step and the trajectory, each picture by itself. ``say`` is told the mean distance after
    each step.
    """
    steps, z, null, found = len(trajectory) - 1, trajectory[-1], empty.detach().expand_as(texts[0]), []
    gap = len(abar) // steps
    for i, (t, text) in enumerate(zip(timesteps(steps, offset, len(abar)), texts, strict=True)):
        aim = trajectory[steps - 1 - i]
        with torch.no_grad():
            conditional = eps(z, t, text)
        null = null.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([null], lr=search.rate(i))
        active = torch.ones(len(z), 1, 1, dtype=torch.bool, device=z.device)
        for _ in range(search.inner(i, steps)):
            loss = search.loss(guided_step(eps, z, t, null, conditional, w, gap, abar), aim)
            optimiser.zero_grad()
            loss.sum().backward()  # of a sum, so that no picture feels how many others there are
            before = null.detach().clone()
            optimiser.step()
            with torch.no_grad():
                null.copy_(torch.where(active, null, before))
            active &= (loss >= search.enough(i)).view(-1, 1, 1)
            if not active.any():
                break
        null = null.detach()
        found.append(null)
        with torch.no_grad():
            z = guided_step(eps, z, t, null, conditional, w, gap, abar)
        say(f"null text: step {i + 1}/{steps}, distance {distance(z, aim).mean().item():.2e}")
    return found


def shared_null_text(
    eps: Denoiser,
    trajectory: Sequence[torch.Tensor],
    text: torch.Tensor,
    empty: torch.Tensor,
    w: float,
    abar: torch.Tensor,
    offset: int = 1,
    inner: int = 10,
) -> torch.Tensor:
    """One embedding B x T x D for all steps, by as many Adam steps as ``null_texts`` may take: its simpler rival.

    Each goes through the trajectory from its noisy end, aiming at the next latent from the trajectory's own.
    """
    steps = len(trajectory) - 1
    gap = len(abar) // steps
    null = empty.detach().expand_as(text).clone().requires_grad_(True)
    optimiser = torch.optim.Adam([null], lr=rate(0))
    for _ in range(inner):
        for i, t in enumerate(timesteps(steps, offset, len(abar))):
            z, aim = trajectory[steps - i], trajectory[steps - 1 - i]
            with torch.no_grad():
                conditional = eps(z, t, text)
            loss = distance(guided_step(eps, z, t, null, conditional, w, gap, abar), aim)
            optimiser.zero_grad()
            loss.sum().backward()
            optimiser.step()
    return null.detach()


def guided_step(
    eps: Denoiser,
    z: torch.Tensor,
    t: int,
    null: torch.Tensor,
    conditional: torch.Tensor,
    w: float,
    gap: int,
    abar: torch.Tensor,
) -> torch.Tensor:
    """One DDIM step under e_u + w (e_c - e_u), e_c given."""
    unconditional = eps(z, t, null)
    return step(z, unconditional + w * (conditional - unconditional), t, t - gap, abar)


@torch.no_grad()
def replay(
    eps: Denoiser,
    z: torch.Tensor,
    text: torch.Tensor,
    nulls: Sequence[torch.Tensor],
    w: float,
    abar: torch.Tensor,
    offset: int = 1,
) -> list[torch.Tensor]:
    """The latents of guided sampling from ``z`` with an empty prompt of its own at each step, clean one last.

    One embedding N times is one shared by all steps; the condition itself makes guidance inert, so that any w gives
    what w = 1 gives (negative-prompt inversion, the fast mode; Miyake 2023).
    """
    latents, gap = [], len(abar) // len(nulls)
    for null, t in zip(nulls, timesteps(len(nulls), offset, len(abar)), strict=True):
        z = guided_step(eps, z, t, null.expand(len(z), -1, -1), eps(z, t, text), w, gap, abar)
        latents.append(z)
    return latents
