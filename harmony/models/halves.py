"""F2. The two halves of a UNet: what lies before a ControlNet's residuals, and what lies behind them.

The first half does not see the residuals. It can be computed once, without gradients, for several ControlNets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel


@dataclass(frozen=True)
class Encoded:
    """``middle`` B x C' x h' x w' and ``skips``, the activations that residuals are added to; ``time`` B x D'."""

    middle: torch.Tensor
    skips: tuple[torch.Tensor, ...]
    time: torch.Tensor


def encode(unet: UNet2DConditionModel, u: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> Encoded:
    """conv_in, down blocks and middle block; u B x C x h x w, t B, text B x T x D."""
    time = unet.time_embedding(unet.get_time_embed(sample=u, timestep=t))
    x = unet.conv_in(u)
    skips = [x]
    for block in unet.down_blocks:
        words = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        x, made = block(hidden_states=x, temb=time, **words)
        skips += made
    return Encoded(unet.mid_block(x, time, encoder_hidden_states=text), tuple(skips), time)


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
