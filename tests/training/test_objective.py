"""The training objective: Liu 2025, eq. 8 by default, golden weights otherwise; the noised latent by its definition."""

import pytest
import torch
from diffusers import DDIMScheduler

from harmony.sampling.ddim import clean_latent, to_eps
from harmony.training.backbone import SCHEDULE
from harmony.training.objective import Objective, add_noise, compute_target

ABAR = DDIMScheduler(**SCHEDULE).alphas_cumprod


@pytest.fixture
def covered():
    """Three instances: none, a quarter of the latent, all of it in part."""
    covered = torch.zeros(3, 1, 8, 8)
    covered[1, :, :4, :4] = 1
    covered[2] = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    return covered


def test_the_default_is_eq_8(covered):
    """Guards the plain loss: every entry counts the same."""
    weight = Objective().compute_weight(ABAR[[0, 500, 999]], covered)
    assert weight.shape == (3, 1, 8, 8) and torch.equal(weight, torch.ones_like(weight))


def test_extra_weight_inside_keeps_the_mean(covered):
    """Guards the scale of the loss: the instance gets 1 + inside times the weight of the rest, the mean stays 1."""
    weight = Objective(inside=3.0).compute_weight(ABAR[[0, 500, 999]], covered)
    assert torch.allclose(weight.mean((1, 2, 3)), torch.ones(3))
    assert torch.allclose(weight[1, 0, 0, 0] / weight[1, 0, 7, 7], torch.tensor(4.0))
    assert torch.equal(weight[0], torch.ones(1, 8, 8)), "an instance that covers no cell changes nothing"


@pytest.mark.parametrize(
    "t, weight",
    [
        (0, 0.2),  # (1 - 0.999150) / 0.999150 = 0.00085, clipped
        (100, 0.2),  # 1 / 8.454 = 0.118, clipped
        (250, (1 - 0.673793) / 0.673793),  # abar of Stable Diffusion's schedule
        (500, (1 - 0.276333) / 0.276333),
        (750, 5.0),  # 1 / 0.05951 = 16.8, clipped
        (999, 5.0),
    ],
)
def test_x0_weights(t, weight):
    """Guards the weight that turns the eps error into that of the clean latent: 1 / SNR, clipped to 0.2 .. 5."""
    got = Objective(weighting="x0").compute_weight(ABAR[[t]], torch.zeros(1, 1, 2, 2))
    assert torch.allclose(got, torch.full((1, 1, 2, 2), weight), rtol=2e-4)


def test_the_target_of_v_and_its_weight():
    """Guards v = sqrt(a) eps - sqrt(1 - a) x0, its way back to eps, and x0 weights that mean the same for it."""
    rng = torch.Generator().manual_seed(0)
    x0, eps, wrong = torch.randn(3, 5, 4, 6, 6, generator=rng)
    a = ABAR[[0, 20, 400, 700, 999]]
    b = a.view(-1, 1, 1, 1)
    z = b.sqrt() * x0 + (1 - b).sqrt() * eps
    v = compute_target("v_prediction", z, eps, a)
    torch.testing.assert_close(v, b.sqrt() * eps - (1 - b).sqrt() * x0, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(to_eps("v_prediction", v, z, b), eps, rtol=1e-4, atol=1e-4)
    assert compute_target("epsilon", z, eps, a) is eps
    off, nothing = v + 0.1 * wrong, torch.zeros(5, 1, 6, 6)
    guess = to_eps("v_prediction", off, z, b)
    clean_error = (clean_latent(z, guess, b) - clean_latent(z, eps, b)) ** 2
    weighted = Objective(weighting="x0").compute_weight(a, nothing, "v_prediction") * (off - v) ** 2
    torch.testing.assert_close(weighted, clean_error, rtol=2e-2, atol=1e-5)
    assert torch.equal(Objective().compute_weight(a, nothing, "v_prediction"), torch.ones(5, 1, 6, 6))


def batch(times):
    rng = torch.Generator().manual_seed(1)
    n = len(times)
    names = {"moments": 8, "masked_moments": 8, "noise": 4, "encode": 4, "encode_masked": 4}
    tensors = {name: torch.randn(n, c, 6, 6, generator=rng) for name, c in names.items()}
    return tensors | {"hole": (torch.rand(n, 1, 6, 6, generator=rng) > 0.5).float(), "time": torch.tensor(times)}


def test_the_noised_latent_by_its_definition():
    """Guards the input: scaled posterior samples, z_t = sqrt(abar) z_0 + sqrt(1 - abar) eps, [hole, masked
    latent].
    """
    b = batch([0.25, 0.9])
    z, known, t = add_noise(b, 0.5, ABAR)
    assert t.tolist() == [250, 900]
    for i, (abar, step) in enumerate(zip((0.673793, float(ABAR[900])), t, strict=True)):
        assert float(ABAR[step]) == pytest.approx(abar, abs=1e-6)
        mean, logvar = b["moments"][i].chunk(2)
        latent = 0.5 * (mean + (logvar / 2).exp() * b["encode"][i])
        assert torch.allclose(z[i], abar**0.5 * latent + (1 - abar) ** 0.5 * b["noise"][i], atol=1e-5)
        mean, logvar = b["masked_moments"][i].chunk(2)
        assert torch.equal(known[i, :1], b["hole"][i])
        assert torch.allclose(known[i, 1:], 0.5 * (mean + (logvar / 2).exp() * b["encode_masked"][i]), atol=1e-6)


@pytest.mark.parametrize("t_min", [0, 200])
def test_timesteps_fill_their_range(t_min):
    """Guards the draw of t: uniform over t_min .. 999, both ends reached, never 1000."""
    times = torch.linspace(0, 1, 4001)[:-1].tolist() + [1 - 2**-24]
    t = add_noise(batch(times), 1.0, ABAR, t_min)[2]
    assert t.min() == t_min and t.max() == 999
    counts = torch.bincount(t, minlength=1000)[t_min:]
    assert counts.min() >= 1 and counts.max() - counts.min() <= 2


def test_a_share_of_the_timesteps_is_the_noisiest():
    """Guards ``noisiest``: that share, evenly over the last 50 timesteps, the rest as without it."""
    times = torch.linspace(0, 1, 8001)[:-1].tolist() + [1 - 2**-24]
    t = add_noise(batch(times), 1.0, ABAR, 200, 0.5)[2]
    assert t.min() == 200 and t.max() == 999
    share = (t >= 950).float().mean().item()
    assert share == pytest.approx(0.5 + 0.5 * 50 / 800, abs=0.002)
    counts = torch.bincount(t, minlength=1000)
    assert counts[950:].min() >= 80 and 4 <= counts[200:950].min() <= counts[200:950].max() <= 6
