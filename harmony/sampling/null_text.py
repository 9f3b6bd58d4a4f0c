"""Null-text inversion: empty-prompt embeddings, one for each step, with which guided sampling restores an image.

Mokady 2022 (Null-text Inversion for Editing Real Images using Guided Diffusion Models, arXiv 2211.09794), Algorithm 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from harmony.models.backbone import Backbone
from harmony.sampling.ddim import level, step, timesteps, to_eps
from harmony.sampling.guidance import predict
from harmony.sampling.text_to_image import full_hole_condition

Denoiser = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]  # (z_t, t, text B x T x D) -> eps


def rate(i: int) -> float:
    """Adam's learning rate at step i (0 = the noisiest)."""
    return 1e-2 * (1 - i / 100)


def tolerance(i: int) -> float:
    """The squared distance below which the search of step i stops."""
    return 1e-5 + 2e-5 * i


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of each of B latents, B."""
    return (a - b).square().mean((1, 2, 3))


@dataclass(frozen=True)
class Search:
    """How the embedding of step i of N is optimized.

    ``inner`` (i, N) Adam steps at most, at the learning rate ``rate`` (i), minimize ``loss`` (the latent after the
    step, the latent of the trajectory) -> B, until it is below ``tolerance`` (i).
    """

    inner: Callable[[int, int], int] = lambda i, n: 10
    rate: Callable[[int], float] = rate
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = distance
    tolerance: Callable[[int], float] = tolerance


def denoiser(backbone: Backbone) -> Denoiser:
    """The backbone as a text-to-image model without guidance; gradients flow to the text."""
    condition = full_hole_condition(backbone)

    def eps(z: torch.Tensor, t: int, text: torch.Tensor) -> torch.Tensor:
        time = torch.full((len(z),), t, device=z.device, dtype=torch.long)
        output = predict(backbone.unet, z, condition.expand(len(z), -1, -1, -1), time, text)
        return to_eps(backbone.prediction_type, output, z, level(backbone.alphas_cumprod, t).to(z.dtype))

    return eps


def null_texts(
    eps: Denoiser,
    trajectory: Sequence[torch.Tensor],
    texts: Sequence[torch.Tensor],
    empty_text: torch.Tensor,
    w: float,
    abar: torch.Tensor,
    offset: int = 1,
    search: Search = Search(),
    say: Callable[[str], None] = lambda line: None,
) -> list[torch.Tensor]:
    """N embeddings B x T x D, noisiest step first; each starts from the previous one and is optimized by ``search``.

    ``trajectory`` z_0 .. z_N (B x C x h x w each) comes from ``ddim.invert`` without guidance; ``texts`` are the states
    B x T x D of the picture's prompt for each step; ``empty_text`` 1 x T x D is the state of the empty prompt. At step
    i the loss between the guided step and the trajectory is minimized for each picture separately. ``say`` reports the
    mean distance after each step. Each step has an Adam of its own, as in the released code (that of zero-shot
    harmonization, Chen 2023, takes AdamW).
    """
    steps, z, null, nulls = len(trajectory) - 1, trajectory[-1], empty_text.detach().expand_as(texts[0]), []
    gap = len(abar) // steps
    for i, (t, text) in enumerate(zip(timesteps(steps, offset, len(abar)), texts, strict=True)):
        target = trajectory[steps - 1 - i]
        with torch.no_grad():
            conditional = eps(z, t, text)
        null = null.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([null], lr=search.rate(i))
        is_active = torch.ones(len(z), 1, 1, dtype=torch.bool, device=z.device)
        for _ in range(search.inner(i, steps)):
            loss = search.loss(guided_step(eps, z, t, null, conditional, w, gap, abar), target)
            optimizer.zero_grad()
            loss.sum().backward()  # of a sum, so that a picture's gradient does not depend on the batch size
            old_null = null.detach().clone()
            optimizer.step()
            with torch.no_grad():
                null.copy_(torch.where(is_active, null, old_null))
            is_active &= (loss >= search.tolerance(i)).view(-1, 1, 1)
            if not is_active.any():
                break
        null = null.detach()
        nulls.append(null)
        with torch.no_grad():
            z = guided_step(eps, z, t, null, conditional, w, gap, abar)
        say(f"null text: step {i + 1}/{steps}, distance {distance(z, target).mean().item():.2e}")
    return nulls


def shared_null_text(
    eps: Denoiser,
    trajectory: Sequence[torch.Tensor],
    text: torch.Tensor,
    empty_text: torch.Tensor,
    w: float,
    abar: torch.Tensor,
    offset: int = 1,
    inner: int = 10,
) -> torch.Tensor:
    """One embedding B x T x D for all steps, a simpler alternative to ``null_texts`` with as many Adam steps.

    Each of the ``inner`` passes goes through the trajectory from its noisy end; at each step the target is the next
    latent of the trajectory.
    """
    steps = len(trajectory) - 1
    gap = len(abar) // steps
    null = empty_text.detach().expand_as(text).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([null], lr=rate(0))
    for _ in range(inner):
        for i, t in enumerate(timesteps(steps, offset, len(abar))):
            z, target = trajectory[steps - i], trajectory[steps - 1 - i]
            with torch.no_grad():
                conditional = eps(z, t, text)
            loss = distance(guided_step(eps, z, t, null, conditional, w, gap, abar), target)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
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
    """One DDIM step with guidance e_u + w (e_c - e_u), where ``conditional`` is e_c."""
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
    """The latents of guided sampling from ``z`` with a separate empty prompt for each step, the clean latent last.

    With ``text`` itself as the empty prompt guidance has no effect, and any w gives the result of w = 1
    (negative-prompt inversion, the fast mode; Miyake 2023).
    """
    latents, gap = [], len(abar) // len(nulls)
    for null, t in zip(nulls, timesteps(len(nulls), offset, len(abar)), strict=True):
        z = guided_step(eps, z, t, null.expand(len(z), -1, -1), eps(z, t, text), w, gap, abar)
        latents.append(z)
    return latents
