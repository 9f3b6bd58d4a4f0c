"""An initialization of AutoencoderKL whose group norms are the identity, so that brightness and color are kept.

A group norm subtracts the mean of each picture and divides by its standard deviation. An autoencoder must keep both,
and spends most of a short training on recovering them. Here two channels of every tensor before a norm carry the
constants +C and -C. With C far above the signal the group's mean is nearly 0 and its standard deviation nearly
C sqrt(2 / channels) for every picture, so a gain of that size makes the norm the identity. The network is still a plain
AutoencoderKL that diffusers can load.
"""

import torch
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

CONSTANT = 30.0  # for a signal of about 1, so that the standard deviation varies by some percent


def freeze_constants(p: nn.Parameter, outputs: bool = True, inputs: bool = False) -> None:
    """Stop the gradients of the entries of ``p`` that produce (``outputs``) or read (``inputs``) the two constants."""

    def stop(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        if outputs:
            gradient[:2] = 0
        if inputs:
            gradient[:, :2] = 0
        return gradient

    p.register_hook(stop)


def emit(conv: nn.Conv2d, constant: float, reads: bool = False) -> None:
    """Let ``conv`` produce the constants by its bias; with ``reads`` it ignores the constants of its input."""
    conv.weight[:2] = 0
    if reads:
        conv.weight[:, :2] = 0
    conv.bias[:2] = conv.bias.new_tensor([constant, -constant])
    freeze_constants(conv.weight, inputs=reads)
    freeze_constants(conv.bias)


@torch.no_grad()
def steady_norms(vae: AutoencoderKL) -> AutoencoderKL:
    """Rewrite the fresh weights of ``vae`` in place; train it without weight decay, which would change them.

    ValueError unless the norms have one group, because every group would need two channels for the constants.
    """
    if vae.config.norm_num_groups != 1 or vae.config.mid_block_add_attention:
        raise ValueError("steady norms need norm_num_groups=1 and mid_block_add_attention=false")
    emit(vae.encoder.conv_in, CONSTANT)
    emit(vae.decoder.conv_in, CONSTANT)
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.fill_(CONSTANT * (2 / module.num_channels) ** 0.5)
            module.weight[:2] = 0  # the constants end here: the layers after the norm do not see them
            freeze_constants(module.weight)
            freeze_constants(module.bias)
        elif isinstance(module, ResnetBlock2D):
            emit(module.conv1, CONSTANT)
            emit(module.conv2, 0.0)  # the block's sum keeps the constants of its input
            if module.conv_shortcut is not None:
                emit(module.conv_shortcut, 0.0, reads=True)
                module.conv_shortcut.weight[:2, :2] = torch.eye(2)[:, :, None, None]
        elif isinstance(module, Downsample2D | Upsample2D):
            emit(module.conv, CONSTANT, reads=True)
    return vae
