"""The two halves of a UNet together are the UNet, with and without residuals."""

import pytest
import torch

from harmony.models.backbone import Backbone
from harmony.models.unet_halves import decode, encode, residuals
from harmony.sampling.guidance import predict


@pytest.fixture(scope="module")
def backbone(random_backbone):
    return Backbone(str(random_backbone))


@pytest.mark.parametrize("side", [8, 10])
def test_the_halves_make_the_whole(backbone, awake, side):
    """Guards every connection: bit for bit the UNet's own forward, alone and with a ControlNet, at odd sides too."""
    torch.manual_seed(0)
    z, known, text = torch.randn(2, 4, side, side), torch.randn(2, 5, side, side), torch.randn(2, 16, 32)
    t, hint, net = torch.tensor([3, 700]), torch.rand(2, 3, 4 * side, 4 * side), awake(backbone)
    u = torch.cat([z, known], 1)
    with torch.no_grad():
        first = encode(backbone.unet, u, t, text)
        plain = predict(backbone.unet, z, known, t, text)
        assert torch.equal(decode(backbone.unet, first, text), plain)
        down, middle = net(u[:, :4], t, text, hint, return_dict=False)
        ours = residuals(net, u[:, :4], t, text, net.controlnet_cond_embedding(hint))
        assert all(torch.equal(a, b) for a, b in zip((*ours[0], ours[1]), (*down, middle), strict=True))
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        stock = backbone.unet(u, t, text, **added, return_dict=False)[0]
        assert torch.equal(decode(backbone.unet, first, text, ours), stock) and not torch.equal(stock, plain)
