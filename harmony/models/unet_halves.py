"""The two halves of a UNet: before and after the point where a ControlNet's residuals are added.

The first half does not depend on the residuals, so it can be computed once, without gradients, for several ControlNets.
A ControlNet is itself such a first half, with a convolution after each activation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

Residuals = tuple[tuple[torch.Tensor, ...], torch.Tensor]  # for the skips, for the middle block


@dataclass(frozen=True)
class Activations:
    """The output of the first half: ``middle`` B x C' x h' x w', the ``skips``, and the embedding ``time`` B x D'."""

    middle: torch.Tensor
    skips: tuple[torch.Tensor, ...]
    time: torch.Tensor


def embed_time(net: UNet2DConditionModel | ControlNetModel, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Embed B timesteps -> B x D'."""
    return net.time_embedding(net.time_proj(t).to(dtype))


def encode(
    net: UNet2DConditionModel | ControlNetModel,
    u: torch.Tensor,
    t: torch.Tensor,
    text: torch.Tensor,
    hint_embedding: torch.Tensor | None = None,
) -> Activations:
    """Run the first half: conv_in, down blocks and middle block; u B x C x h x w, t B, text B x T x D.

    ``hint_embedding`` B x C' x h x w is added after conv_in (ControlNets only).
    """
    time = embed_time(net, t, u.dtype)
    x = net.conv_in(u) if hint_embedding is None else net.conv_in(u) + hint_embedding
    skips = [x]
    for block in net.down_blocks:
        words = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        x, outputs = block(hidden_states=x, temb=time, **words)
        skips += outputs
    return Activations(net.mid_block(x, time, encoder_hidden_states=text), tuple(skips), time)


def residuals(
    net: ControlNetModel, u: torch.Tensor, t: torch.Tensor, text: torch.Tensor, hint_embedding: torch.Tensor
) -> Residuals:
    """The residuals of a ControlNet; ``hint_embedding`` = ``controlnet_cond_embedding`` of its hint."""
    activations = encode(net, u, t, text, hint_embedding)
    skips = zip(activations.skips, net.controlnet_down_blocks, strict=True)
    return tuple(conv(skip) for skip, conv in skips), net.controlnet_mid_block(activations.middle)


def decode(
    unet: UNet2DConditionModel,
    activations: Activations,
    text: torch.Tensor,
    residuals: tuple[Sequence[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run the second half, with ``residuals`` = (one for each skip, one for the middle) added; eps B x C x h x w."""
    skips, x = list(activations.skips), activations.middle
    if residuals is not None:
        skips = [skip + r for skip, r in zip(skips, residuals[0], strict=True)]
        x = x + residuals[1]
    for n, block in enumerate(unet.up_blocks):
        block_skips = tuple(skips[-len(block.resnets) :])
        del skips[-len(block.resnets) :]
        words = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        size = skips[-1].shape[2:] if n < len(unet.up_blocks) - 1 else None  # for sides that are no power of two
        x = block(
            hidden_states=x, res_hidden_states_tuple=block_skips, temb=activations.time, upsample_size=size, **words
        )
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
