"""DDIM: deterministic sampling and its exact algebraic inverse (Song 2021, arXiv 2010.02502).

A sampler is a function of an eps model, a latent and a number of steps; guidance, controls and masks are part of the
model.
"""

from collections.abc import Callable, Iterable

import torch

from harmony.core.errors import UserError

Eps = Callable[[torch.Tensor, int], torch.Tensor]  # (z_t, t) -> predicted noise, same shape


def timesteps(n: int, offset: int = 1, total: int = 1000) -> list[int]:
    """N descending timesteps with "leading" spacing: for n = 50 and offset 1 these are 981, 961, ..., 21, 1."""
    if not 1 <= n <= total - offset:
        raise UserError(f"steps={n}: choose between 1 and {total - offset}")
    return [i * (total // n) + offset for i in reversed(range(n))]


def level(abar: torch.Tensor, t: int) -> torch.Tensor:
    """The signal level abar_t; below t = 0 it is abar_0 (``set_alpha_to_one=False``)."""
    return abar[max(t, 0)]


def clean_latent(z: torch.Tensor, eps: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Predict the clean latent x0 = (z_t - sqrt(1 - a) eps) / sqrt(a)."""
    return (z - (1 - a).sqrt() * eps) / a.sqrt()


def to_eps(kind: str, output: torch.Tensor, z: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Convert a network's output to eps: itself (``epsilon``), or sqrt(a) v + sqrt(1 - a) z (``v_prediction``).

    v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans 2022). UserError for other kinds.
    """
    if kind == "epsilon":
        return output
    if kind == "v_prediction":
        return a.sqrt() * output + (1 - a).sqrt() * z
    raise UserError(f"the backbone predicts '{kind}': epsilon and v_prediction are supported")


def step(z: torch.Tensor, eps: torch.Tensor, t: int, s: int, abar: torch.Tensor) -> torch.Tensor:
    """One DDIM step from level t to level s: z_s = sqrt(a_s) x0 + sqrt(1 - a_s) eps (Song 2021, eq. 12 with sigma = 0).

    s < t samples, s > t inverts; with the same eps one is the inverse of the other.
    """
    a_t, a_s = level(abar, t), level(abar, s)
    return a_s.sqrt() * clean_latent(z, eps, a_t) + (1 - a_s).sqrt() * eps


def sample(eps: Eps, z: torch.Tensor, steps: int, abar: torch.Tensor, offset: int = 1) -> torch.Tensor:
    """Sample: latent at the noisiest level -> clean latent, by ``steps`` evaluations of eps."""
    for t in timesteps(steps, offset, len(abar)):
        z = step(z, eps(z, t), t, t - len(abar) // steps, abar)
    return z


def invert(eps: Eps, z: torch.Tensor, steps: int, abar: torch.Tensor, offset: int = 1) -> list[torch.Tensor]:
    """Invert: clean latent -> the trajectory z_0 .. z_N, from whose end ``sample`` returns to the clean latent.

    Exact for a constant eps; otherwise eps is evaluated at the latent before the step, which is close without guidance.
    Needs float32.
    """
    trajectory = [z]
    for t in reversed(timesteps(steps, offset, len(abar))):
        z = step(z, eps(z, t), t - len(abar) // steps, t, abar)
        trajectory.append(z)
    return trajectory


def noise_for(
    seeds: Iterable[tuple[int, int]], shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Unit noise B x shape; the noise of a sample depends only on its (seed, index), not on the number of processes."""
    draws = []
    for seed, index in seeds:
        rng = torch.Generator("cpu").manual_seed((int(seed) * 1_000_003 + int(index)) % 2**63)
        draws.append(torch.randn(shape, generator=rng))
    return torch.stack(draws).to(device)
