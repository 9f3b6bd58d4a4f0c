"""A start for AutoencoderKL from which its group norms do nothing, so that brightness and colour pass through.

A group norm divides each picture by its own deviation and takes its own mean away, which is just what an autoencoder
must keep; the network then spends most of a short training on winning it back. Here two channels of every normed
tensor carry the constants +C and -C. With C far above the signal the group's mean is nearly 0 and its deviation nearly
C sqrt(2 / channels) whatever the picture, so a gain of that size makes the norm the identity. The network stays a
plain AutoencoderKL that diffusers loads.
"""

import torch
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

CONSTANT = 30.0  # against a signal of about 1: the deviation then varies by some percent


def held(p: nn.Parameter, outputs: bool = True, inputs: bool = False) -> None:
    """No gradient ever moves the entries of ``p`` that make (``outputs``) or read (``inputs``) the two constants."""

    def stop(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        if outputs:
            gradient[:2] = 0
        if inputs:
            gradient[:, :2] = 0
        return gradient

    p.register_hook(stop)


def emit(conv: nn.Conv2d, constant: float, reads: bool = False) -> None:
    """``conv`` gives the constants by its bias; with ``reads`` its input has them too, and is not looked at there."""
    conv.weight[:2] = 0
    if reads:
        conv.weight[:, :2] = 0
    conv.bias[:2] = conv.bias.new_tensor([constant, -constant])
    held(conv.weight, inputs=reads)
    held(conv.bias)


@torch.no_grad()
def steady_norms(vae: AutoencoderKL) -> AutoencoderKL:
    """Rewrite the fresh weights of ``vae`` in place; train it with weight decay 0, which would move the constants.

    ValueError unless the norms have one group, since every group would need its own two channels.
    """
    if vae.config.norm_num_groups != 1 or vae.config.mid_block_add_attention:
        raise ValueError("steady norms need norm_num_groups=1 and mid_block_add_attention=false")
    emit(vae.encoder.conv_in, CONSTANT)
    emit(vae.decoder.conv_in, CONSTANT)
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.fill_(CONSTANT * (2 / module.num_channels) ** 0.5)
            module.weight[:2] = 0  # the constants end here: what follows the norm never sees them
            held(module.weight)
            held(module.bias)
        elif isinstance(module, ResnetBlock2D):
            emit(module.conv1, CONSTANT)
            emit(module.conv2, 0.0)  # the block's sum keeps the constants of its input
            if module.conv_shortcut is not None:
                emit(module.conv_shortcut, 0.0, reads=True)
                module.conv_shortcut.weight[:2, :2] = torch.eye(2)[:, :, None, None]
        elif isinstance(module, Downsample2D | Upsample2D):
            emit(module.conv, CONSTANT, reads=True)
    return vae
