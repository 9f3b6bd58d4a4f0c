"""Null-text inversion (Mokady 2022): its invariants on a random backbone, in float64 where they are exact."""

import pytest
import torch

from harmony.models.backbone import Backbone
from harmony.sampling.ddim import invert, sample, step, timesteps
from harmony.sampling.null_text import Search, denoiser, null_texts, rate, replay, tolerance
from harmony.sampling.text_to_image import full_hole_condition

STEPS, W = 10, 7.5


@pytest.fixture(scope="module")
def world(random_backbone):
    """(eps, abar, text, empty, trajectory) of a backbone in float64, and a latent that was inverted."""
    torch.manual_seed(0)
    backbone = Backbone(str(random_backbone), dtype=torch.float64)
    eps, abar = denoiser(backbone), backbone.alphas_cumprod.double()
    text, empty = backbone.prompt(["a red mushroom on snow"]), backbone.prompt([""])
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        trajectory = invert(lambda z, t: eps(z, t, text), z, STEPS, abar)
    return eps, abar, text, empty, trajectory


def miss(latents: list[torch.Tensor], trajectory: list[torch.Tensor]) -> float:
    return (latents[-1] - trajectory[0]).square().mean().item()


def test_golden_schedules():
    """Guards learning rate and early stop of the released code."""
    assert [round(rate(i), 4) for i in (0, 10, 49)] == [0.01, 0.009, 0.0051]
    assert [tolerance(i) for i in (0, 10, 49)] == pytest.approx([1e-5, 2.1e-4, 9.9e-4])


def test_constant_eps_comes_back_exactly():
    """Guards inversion: the ladder up is the mirror image of the ladder down, a constant eps is undone."""
    abar = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
    z, e = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    asked = []
    trajectory = invert(lambda z, t: (asked.append(t), e)[1], z, 20, abar)
    assert asked == timesteps(20)[::-1] and len(trajectory) == 21
    assert torch.allclose(sample(lambda z, t: e, trajectory[-1], 20, abar), z, atol=1e-12)
    assert torch.allclose(step(step(z, e, 100, 150, abar), e, 150, 100, abar), z, atol=1e-12)


def test_null_texts_bring_the_image_back(world):
    """Guards reconstruction: nearer than guidance alone and than fewer improvements; what is stored replays it."""
    eps, abar, text, empty, trajectory = world
    lines = []
    nulls = null_texts(eps, trajectory, [text] * STEPS, empty, W, abar, say=lines.append)
    assert len(nulls) == STEPS == len(lines) and all(null.shape == empty.shape for null in nulls)
    guided = replay(eps, trajectory[-1], text, [empty] * STEPS, W, abar)
    little = null_texts(eps, trajectory, [text] * STEPS, empty, W, abar, search=Search(lambda i, n: 1))
    fewer = replay(eps, trajectory[-1], text, little, W, abar)
    ours = replay(eps, trajectory[-1], text, nulls, W, abar)
    summed = [
        sum((a - b).square().mean().item() for a, b in zip(latents, trajectory[-2::-1], strict=True))
        for latents in (ours, fewer, guided)
    ]
    assert summed[0] <= summed[1] <= summed[2] and miss(ours, trajectory) < miss(guided, trajectory)
    again = replay(eps, trajectory[-1], text, nulls, W, abar)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, again, strict=True))
    last = float(lines[-1].split()[-1])
    assert last == pytest.approx(miss(ours, trajectory), rel=0.01), "the replay is the optimisation's own trajectory"


def test_without_guidance_nothing_moves(world):
    """Guards guidance: at w = 1 the embeddings have no gradient; the condition in their place makes w inert."""
    eps, abar, text, empty, trajectory = world
    found = null_texts(eps, trajectory, [text] * STEPS, empty, 1.0, abar, search=Search(lambda i, n: 2))
    assert all(torch.equal(null, empty) for null in found)
    one, many = (replay(eps, trajectory[-1], text, [text] * STEPS, w, abar)[-1] for w in (1.0, 7.5))
    assert torch.allclose(one, many, atol=1e-10)


def test_what_a_backbone_knows_of_an_empty_picture(random_backbone):
    """Guards both kinds of UNet: all hole and mid-grey for inpainting; nothing for text to image."""
    backbone = Backbone(str(random_backbone))
    known = full_hole_condition(backbone, 2)
    assert known.shape == (2, 5, 8, 8) and (known[:, 0] == 1).all() and known[:, 1:].abs().max() > 0
