"""Fusion of ControlNets, guidance, and the nine channels of the inpainting UNet."""

from types import SimpleNamespace

import pytest
import torch

from harmony.errors import UserError
from harmony.models.kit import Kit
from harmony.sampling.inpaint import control_residuals, guided, inpaint, predict


@pytest.fixture(scope="module")
def scene(random_kit, awake):
    """A kit, two ControlNets with their hints, and everything that sampling starts from."""
    kit, rng = Kit(str(random_kit)), torch.Generator().manual_seed(0)

    s = SimpleNamespace(kit=kit)
    s.noise = torch.randn(2, 4, 8, 8, generator=rng)
    s.hole = (torch.rand(2, 1, 8, 8, generator=rng) > 0.5).float()
    s.masked = torch.randn(2, 4, 8, 8, generator=rng)
    s.known = torch.cat([s.hole, s.masked], 1)
    s.text, s.empty = kit.prompt(["a red mushroom", "a blue car"]), kit.prompt([""])
    s.nets = [awake(kit, 1), awake(kit, 2)]
    s.hints = [torch.rand(2, 3, 32, 32, generator=rng) for _ in s.nets]
    s.t = torch.tensor([481, 481])

    def run(*weights, guidance=2.0):
        controls = list(zip(s.nets, s.hints, weights, strict=False))
        return inpaint(kit, s.noise, s.hole, s.masked, s.text, s.empty, guidance, 3, controls)

    s.run = run
    return s


@pytest.fixture
def count(scene):
    """Batch sizes of all evaluations of the ControlNets and of the UNet."""
    calls = {"net": [], "unet": []}
    hooks = [net.register_forward_hook(lambda m, x, y: calls["net"].append(len(x[0]))) for net in scene.nets]
    hooks.append(scene.kit.unet.register_forward_hook(lambda m, x, y: calls["unet"].append(len(x[0]))))
    yield calls
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def residuals(scene, *weights):
    controls = list(zip(scene.nets, scene.hints, weights, strict=True))
    down, middle = control_residuals(controls, torch.cat([scene.noise, scene.known], 1), scene.t, scene.text)
    return [*down, middle]


def test_fusion_is_linear(scene):
    for both, first, second in zip(
        residuals(scene, 0.7, 0.3), residuals(scene, 1, 0), residuals(scene, 0, 1), strict=True
    ):
        assert first.abs().max() > 1e-3
        assert second.abs().max() > 1e-3
        torch.testing.assert_close(both, 0.7 * first + 0.3 * second, rtol=1e-5, atol=1e-6)


def test_no_weight_is_plain_inpainting_and_runs_no_net(scene, count):
    plain = scene.run()
    assert torch.equal(scene.run(0, 0), plain)
    assert count["net"] == []
    assert not torch.equal(scene.run(1, 0), plain)


def test_one_weight_is_the_single_net(scene, count):
    both = scene.run(1, 0)
    assert len(count["net"]) == 3  # the first net, once a step
    assert torch.equal(scene.run(1), both)
    assert not torch.equal(scene.run(1, 1), both)


@torch.no_grad()
def test_channel_order_matters(scene):
    right = predict(scene.kit.unet, scene.noise, torch.cat([scene.hole, scene.masked], 1), scene.t, scene.text)
    wrong = predict(scene.kit.unet, scene.noise, torch.cat([scene.masked, scene.hole], 1), scene.t, scene.text)
    assert (right - wrong).abs().max() > 1e-3


@torch.no_grad()
def test_guidance(scene, count):
    def eps(w, text=scene.text):
        return guided(scene.kit, scene.known, text, scene.empty, w)(scene.noise, 481)

    conditional, unconditional = eps(1), eps(1, scene.empty.expand_as(scene.text))
    assert count["unet"] == [2, 2]  # w = 1 needs one half only
    torch.testing.assert_close(eps(0), unconditional, rtol=1e-5, atol=1e-6)
    expected = unconditional + 7.5 * (conditional - unconditional)
    torch.testing.assert_close(eps(7.5), expected, rtol=1e-4, atol=1e-5)
    assert count["unet"][2:] == [4, 4]
    assert (conditional - unconditional).abs().max() > 1e-4


def test_the_same_noise_gives_the_same_latent(scene):
    assert torch.equal(scene.run(1, 1), scene.run(1, 1))


def test_a_kit_that_predicts_v_gives_eps(scene, random_kit):
    """Guards the conversion: guidance and all, eps = sqrt(a) v + sqrt(1 - a) z; other kinds are one line."""
    e, v, other = (Kit(str(random_kit)) for _ in range(3))
    v.scheduler.register_to_config(prediction_type="v_prediction")
    other.scheduler.register_to_config(prediction_type="sample")
    z, t = torch.randn(scene.known.shape[0], 4, *scene.known.shape[2:]), 300
    out, eps = (guided(kit, scene.known, scene.text, scene.empty, 2.0)(z, t) for kit in (e, v))
    a = e.alphas_cumprod[t]
    torch.testing.assert_close(eps, a.sqrt() * out + (1 - a).sqrt() * z)
    with pytest.raises(UserError, match="predicts 'sample'"):
        guided(other, scene.known, scene.text, scene.empty, 2.0)(z, t)
