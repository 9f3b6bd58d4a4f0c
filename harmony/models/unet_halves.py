"""The two halves of a UNet: what lies before a ControlNet's residuals, and what lies behind them.

The first half does not see the residuals. It can be computed once, without gradients, for several ControlNets. A
ControlNet is such a first half itself, with a convolution behind each activation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

Residuals = tuple[tuple[torch.Tensor, ...], torch.Tensor]  # for the skips, for the middle block


@dataclass(frozen=True)
class Encoded:
    """``middle`` B x C' x h' x w' and ``skips``, the activations that residuals are added to; ``time`` B x D'."""

    middle: torch.Tensor
    skips: tuple[torch.Tensor, ...]
    time: torch.Tensor


def time_of(net: UNet2DConditionModel | ControlNetModel, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """B timesteps -> the embedding B x D' that the blocks are told."""
    return net.time_embedding(net.time_proj(t).to(dtype))


def encode(
    net: UNet2DConditionModel | ControlNetModel,
    u: torch.Tensor,
    t: torch.Tensor,
    text: torch.Tensor,
    added: torch.Tensor | None = None,
) -> Encoded:
    """conv_in, down blocks and middle block; u B x C x h x w, t B, text B x T x D. ``added``: what a ControlNet makes
    of its hint, B x C' x h x w.
    """
    time = time_of(net, t, u.dtype)
    x = net.conv_in(u) if added is None else net.conv_in(u) + added
    skips = [x]
    for block in net.down_blocks:
        words = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        x, made = block(hidden_states=x, temb=time, **words)
        skips += made
    return Encoded(net.mid_block(x, time, encoder_hidden_states=text), tuple(skips), time)


def residuals(
    net: ControlNetModel, u: torch.Tensor, t: torch.Tensor, text: torch.Tensor, added: torch.Tensor
) -> Residuals:
    """What a ControlNet adds to the UNet; ``added`` = ``controlnet_cond_embedding`` of its hint."""
    encoded = encode(net, u, t, text, added)
    skips = zip(encoded.skips, net.controlnet_down_blocks, strict=True)
    return tuple(conv(skip) for skip, conv in skips), net.controlnet_mid_block(encoded.middle)


def decode(
    unet: UNet2DConditionModel,
    encoded: Encoded,
    text: torch.Tensor,
    residuals: tuple[Sequence[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Up blocks and output, eps B x C x h x w, with ``residuals`` = (one for each skip, that of the middle) added."""
    skips, x = list(encoded.skips), encoded.middle
    if residuals is not None:
        skips = [skip + r for skip, r in zip(skips, residuals[0], strict=True)]
        x = x + residuals[1]
    for n, block in enumerate(unet.up_blocks):
        taken = tuple(skips[-len(block.resnets) :])
        del skips[-len(block.resnets) :]
        words = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        size = skips[-1].shape[2:] if n < len(unet.up_blocks) - 1 else None  # sides that are no power of two
        x = block(hidden_states=x, res_hidden_states_tuple=taken, temb=encoded.time, upsample_size=size, **words)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
