"""An autoencoder with steady norms behaves as one without norms, stays so in training, and is a plain AutoencoderKL."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from harmony.models.steady_norms import CONSTANT, steady_norms
from harmony.training.muon import Muon

CONFIG = {
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 32, 32], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 1,
    "mid_block_add_attention": False,
}  # fmt: skip


def normed(vae, x):
    """[(input, output)] of every group norm."""
    seen = []
    norms = [m for m in vae.modules() if isinstance(m, nn.GroupNorm)]
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append((i[0].detach(), o.detach()))) for m in norms]
    y = vae(x).sample
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(norms) > 20
    return seen, y


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return steady_norms(AutoencoderKL(**CONFIG))


def test_norms_start_as_the_identity(vae):
    """Guards the gain: but for one small number a picture, every norm returns its input, and hides the constants."""
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    for inside, outside in normed(vae, x)[0]:
        difference = outside[:, 2:] - inside[:, 2:]
        offset = difference.mean((1, 2, 3), keepdim=True)
        assert (difference - offset).norm() < 0.05 * inside[:, 2:].norm()
        assert (inside[:, :2].abs() == CONSTANT).all() and not outside[:, :2].any()


def test_brightness_passes(vae):
    """Guards the purpose: half the contrast in gives about half the change of latent out; plain norms level it."""
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    plain = AutoencoderKL(**CONFIG)

    def ratio(net):
        a, b, zero = (net.encode(v).latent_dist.mean for v in (x, x / 2, x * 0))
        return float((b - zero).norm() / (a - zero).norm())

    with torch.no_grad():
        assert ratio(vae) < 0.65 and ratio(plain) > 0.75


def test_training_leaves_the_constants(vae, tmp_path):
    """Guards the stopped gradients: after steps of Muon at a high rate the constants are the same to the last bit."""
    before = copy.deepcopy(vae.state_dict())
    optimiser = Muon(vae.parameters(), lr=2e-2, weight_decay=0.0)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    for _ in range(3):
        optimiser.zero_grad()
        (vae(x).sample - x).square().mean().backward()
        optimiser.step()
    assert all(
        (inside[:, :2].abs() == CONSTANT).all() and not outside[:, :2].any() for inside, outside in normed(vae, x)[0]
    )
    assert not torch.equal(vae.decoder.conv_out.weight, before["decoder.conv_out.weight"])
    vae.save_pretrained(tmp_path)
    again = AutoencoderKL.from_pretrained(tmp_path)
    assert torch.equal(again(x).sample, vae(x).sample)


@pytest.mark.parametrize("wrong", [{"norm_num_groups": 4}, {"mid_block_add_attention": True}])
def test_other_geometries_are_refused(wrong):
    """Guards the assumption: several groups, or attention, would need constants of their own."""
    with pytest.raises(ValueError, match="steady norms need"):
        steady_norms(AutoencoderKL(**CONFIG | wrong))
