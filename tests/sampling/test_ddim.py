"""DDIM: the schedule's numbers, one step by hand, exact inversion, noise that belongs to a sample."""

import pytest
import torch
from diffusers import DDIMScheduler

from harmony.core.errors import UserError
from harmony.sampling.ddim import clean_latent, noise_for, sample, step, timesteps
from harmony.training.backbone import SCHEDULE

GOLDEN = {  # abar_t, computed independently in float64
    0: 0.999150, 1: 0.998296, 20: 0.981314, 21: 0.980381, 100: 0.894223, 250: 0.673793,
    500: 0.276333, 750: 0.056170, 980: 0.005844, 999: 0.004660,
}  # fmt: skip


@pytest.fixture(scope="module")
def abar():
    """abar in float64: a product of 1 - beta, beta linear in its root."""
    beta = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, 0)


def test_schedule_has_the_published_levels(abar):
    for levels in (abar, DDIMScheduler(**SCHEDULE).alphas_cumprod):
        assert {t: float(levels[t]) for t in GOLDEN} == pytest.approx(GOLDEN, abs=2e-6)


@pytest.mark.parametrize("offset, ends", [(0, [980, 960, 20, 0]), (1, [981, 961, 21, 1])])
def test_timesteps(offset, ends):
    ladder = timesteps(50, offset)
    assert len(ladder) == 50
    assert ladder[:2] + ladder[-2:] == ends
    scheduler = DDIMScheduler(**{**SCHEDULE, "steps_offset": offset})
    for n in (1, 7, 20, 50, 333):  # also those that do not divide 1000
        scheduler.set_timesteps(n)
        assert timesteps(n, offset) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("n", [0, -1, 1000, 1001])
def test_impossible_step_counts_are_refused(n, abar):
    with pytest.raises(UserError, match="choose between 1 and 999"):
        sample(lambda z, t: z, torch.zeros(1), n, abar)


def test_one_step_by_hand(abar):
    z, e = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.3, dtype=torch.float64)
    assert float(clean_latent(z, e, abar[500])) == pytest.approx(1.817109, abs=1e-6)
    assert float(step(z, e, 500, 480, abar)) == pytest.approx(0.751046, abs=1e-6)


def test_a_step_equals_that_of_the_library():
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(50)
    z, e = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for t in (981, 481, 1):
        assert torch.equal(step(z, e, t, t - 20, scheduler.alphas_cumprod), scheduler.step(e, t, z).prev_sample)


def test_the_inverse_step_is_exact(abar):
    z, e = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in timesteps(50):
        there = step(z, e, t - 20, t, abar)
        assert (step(there, e, t, t - 20, abar) - z).abs().max() < 1e-12
        assert (there - z).abs().max() > 1e-3


def test_constant_eps_is_reconstructed(abar):
    clean_latent, e = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = clean_latent
    for t in reversed(timesteps(50)):
        z = step(z, e, t - 20, t, abar)
    assert (z - clean_latent).abs().max() > 0.5
    assert (sample(lambda z, t: e, z, 50, abar) - clean_latent).abs().max() < 1e-12


def test_noise_belongs_to_seed_and_index():
    shape = (4, 8, 8)
    together = noise_for([(3, i) for i in (0, 1, 2, 7)], shape)
    assert together.shape == (4, *shape)
    for row, i in enumerate([0, 1, 2, 7]):
        assert torch.equal(noise_for([(3, i)], shape)[0], together[row])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(noise_for([(4, 0)], shape)[0], together[0])
    assert abs(float(noise_for([(0, i) for i in range(64)], shape).std()) - 1) < 0.02
