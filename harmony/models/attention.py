"""Attention control: one mechanism for prompt-to-prompt (Hertz 2022) and zero-shot harmonization (Chen 2023).

Inside ``controlled(unet, control)`` every attention layer asks ``control`` whether it wants to see this layer at this
step; only then the probabilities are computed one by one and handed over, otherwise the layer runs as it always does.
The step counts the UNet's calls since entering, 0 = the noisiest. Afterwards, an exception included, the UNet has its
own processors again.

Rows of a batch for K prompts: [u_0 .. u_{K-1}, c_0 .. c_{K-1}] under guidance, [c_0 .. c_{K-1}] without; row 0 of each
half is the source. ``conditional`` is the one place that knows.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

MAPS = 16  # positions along one side of the maps that say where words look, at most
PLACES = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}


@dataclass(frozen=True)
class Layer:
    """An attention layer: its ``name`` in the UNet, its ``place`` (down, mid, up), and whether it attends to words."""

    name: str
    place: str
    cross: bool


class AttentionControl(Protocol):
    """What may look at attention and change it."""

    def wants(self, layer: Layer, tokens: int, step: int) -> bool:
        """Whether ``layer``, with ``tokens`` query positions, is handed over at ``step``."""
        ...

    def __call__(self, probabilities: torch.Tensor, layer: Layer, step: int) -> torch.Tensor:
        """Probabilities B x heads x N x M after the soft-max -> those to go on with."""
        ...


def conditional(batch: torch.Tensor, prompts: int) -> torch.Tensor:
    """The rows of ``batch`` (first axis) that see the ``prompts``: a view of its last rows."""
    if len(batch) not in (prompts, 2 * prompts):
        raise ValueError(f"a batch of {len(batch)} rows belongs to {prompts} prompts neither with nor without guidance")
    return batch[-prompts:]


def layers(unet: UNet2DConditionModel) -> list[Layer]:
    """All attention layers of the UNet, in the order of its processors."""
    return [
        Layer(name.removesuffix(".processor"), PLACES[name.partition(".")[0]], ".attn2." in name)
        for name in unet.attn_processors
    ]


def map_side(unet: UNet2DConditionModel, side: int) -> int:
    """Positions along one side of the maps that say where words look, for latents of ``side`` cells: the finest layers
    outside the middle that attend to words and have no more than ``MAPS``, else the coarsest there are.
    """
    sides = []
    for block in unet.config.down_block_types:
        sides += [side] if "CrossAttn" in block else []
        side = -(-side // 2)
    return max((s for s in sides if s <= MAPS), default=min(sides))


class Controlled:
    """The attention processor of one layer while a control is at work; ``usual`` is the layer's own."""

    def __init__(self, usual: Callable[..., torch.Tensor], layer: Layer, control: AttentionControl, steps: "Steps"):
        self.usual, self.layer, self.control, self.steps = usual, layer, control, steps

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **more,
    ) -> torch.Tensor:
        """B x N x D -> B x N x D."""
        step = self.steps.taken
        if attention_mask is not None or not self.control.wants(self.layer, hidden_states.shape[1], step):
            return self.usual(attn, hidden_states, encoder_hidden_states, attention_mask, **more)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(project(x))
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        probabilities = attn.get_attention_scores(query, key).unflatten(0, (-1, attn.heads))
        probabilities = self.control(probabilities, self.layer, step)
        out = attn.batch_to_head_dim(torch.bmm(probabilities.flatten(0, 1), value))
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


class Steps:
    """How many times the UNet has been called."""

    def __init__(self):
        self.taken = 0

    def count(self, *_) -> None:
        self.taken += 1


@contextmanager
def controlled(unet: UNet2DConditionModel, control: AttentionControl) -> Iterator[Steps]:
    """While it lasts, ``control`` sees the UNet's attention; gives the counter of its calls."""
    usual, steps = unet.attn_processors, Steps()
    hook = unet.conv_out.register_forward_hook(steps.count)  # the last layer, whichever way the halves are run
    processors = zip(usual.items(), layers(unet), strict=True)
    unet.set_attn_processor({name: Controlled(own, layer, control, steps) for (name, own), layer in processors})
    try:
        yield steps
    finally:
        hook.remove()
        unet.set_attn_processor(usual)


class Known(torch.nn.Module):
    """In the place of a projection whose input never changes: its output, B x T x D."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Of a smaller batch the last rows: the conditional half."""
        return self.value[-len(text) :]


@dataclass(frozen=True)
class Projection:
    """The projection ``name`` (to_k or to_v) of an attention layer, and its ``output`` for the words of a batch."""

    attention: torch.nn.Module
    name: str
    output: Known


def keys_and_values(nets: Iterable[torch.nn.Module], text: torch.Tensor) -> list[Projection]:
    """The keys and values of ``text`` B x T x D in every layer of UNets and ControlNets that attends to words."""
    projections = []
    for net in nets:
        words = text.to(net.conv_in.weight.dtype)
        for attention in (m for name, m in net.named_modules() if name.endswith("attn2")):
            for name in ("to_k", "to_v"):
                projections.append(Projection(attention, name, Known(getattr(attention, name)(words))))
    return projections


@contextmanager
def cached_cross_attention(projections: Iterable[Projection]) -> Iterator[None]:
    """While it lasts, the layers take these keys and values instead of computing them, to the same bits."""
    stock = [(p, getattr(p.attention, p.name)) for p in projections]
    try:
        for p in projections:
            setattr(p.attention, p.name, p.output)
        yield
    finally:
        for p, projection in stock:
            setattr(p.attention, p.name, projection)
