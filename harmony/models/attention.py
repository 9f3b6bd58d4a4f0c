"""Attention control: one mechanism for prompt-to-prompt (Hertz 2022) and zero-shot harmonization (Chen 2023).

Inside ``control_attention(unet, control)`` every attention layer asks ``control`` whether it wants this layer at this
step. If so, the layer computes its attention probabilities explicitly and passes them through ``control``; otherwise it
runs as usual. The step counts the calls of the UNet inside the block, 0 = the noisiest. After the block, also after an
exception, the UNet has its original processors.

Rows of a batch for K prompts: [u_0 .. u_{K-1}, c_0 .. c_{K-1}] with guidance, [c_0 .. c_{K-1}] without; row 0 of each
half is the source. Only ``conditional_rows`` depends on this order.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

MAPS = 16  # largest side of the attention maps that show which positions attend to a word
PLACES = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}


@dataclass(frozen=True)
class Layer:
    """An attention layer: its ``name`` in the UNet, its ``place`` (down, mid, up), whether it is cross-attention."""

    name: str
    place: str
    is_cross: bool


class AttentionControl(Protocol):
    """A control that reads attention probabilities and may change them."""

    def wants(self, layer: Layer, tokens: int, step: int) -> bool:
        """Whether ``layer``, with ``tokens`` query positions, is passed to the control at ``step``."""
        ...

    def __call__(self, probabilities: torch.Tensor, layer: Layer, step: int) -> torch.Tensor:
        """Return the probabilities B x heads x N x M that replace those of the soft-max."""
        ...


def conditional_rows(batch: torch.Tensor, prompts: int) -> torch.Tensor:
    """The rows of ``batch`` (first axis) that are conditioned on the ``prompts``: a view of its last rows."""
    if len(batch) not in (prompts, 2 * prompts):
        raise ValueError(f"a batch of {len(batch)} rows belongs to {prompts} prompts neither with nor without guidance")
    return batch[-prompts:]


def attention_layers(unet: UNet2DConditionModel) -> list[Layer]:
    """All attention layers of the UNet, in the order of its processors."""
    return [
        Layer(name.removesuffix(".processor"), PLACES[name.partition(".")[0]], ".attn2." in name)
        for name in unet.attn_processors
    ]


def map_side(unet: UNet2DConditionModel, side: int) -> int:
    """The side of the cross-attention maps for latents of ``side`` cells.

    It is the largest side up to ``MAPS`` of the cross-attention layers outside the middle block, else the smallest.
    """
    sides = []
    for block in unet.config.down_block_types:
        sides += [side] if "CrossAttn" in block else []
        side = -(-side // 2)
    return max((s for s in sides if s <= MAPS), default=min(sides))


class ControlledProcessor:
    """The attention processor of one layer under a control; ``original`` is the layer's own processor."""

    def __init__(self, original: Callable[..., torch.Tensor], layer: Layer, control: AttentionControl, steps: "Steps"):
        self.original, self.layer, self.control, self.steps = original, layer, control, steps

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **options,
    ) -> torch.Tensor:
        """Attention of hidden states B x N x D -> B x N x D."""
        step = self.steps.number
        if attention_mask is not None or not self.control.wants(self.layer, hidden_states.shape[1], step):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, **options)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(project(x))
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        probabilities = attn.get_attention_scores(query, key).unflatten(0, (-1, attn.heads))
        probabilities = self.control(probabilities, self.layer, step)
        output = attn.batch_to_head_dim(torch.bmm(probabilities.flatten(0, 1), value))
        return attn.to_out[1](attn.to_out[0](output)) / attn.rescale_output_factor


class Steps:
    """A counter of the UNet's calls."""

    def __init__(self):
        self.number = 0

    def add(self, *_) -> None:
        """Count one call (a forward hook)."""
        self.number += 1


@contextmanager
def control_attention(unet: UNet2DConditionModel, control: AttentionControl) -> Iterator[Steps]:
    """Within this block ``control`` controls the UNet's attention; yields the counter of the UNet's calls."""
    originals, steps = unet.attn_processors, Steps()
    hook = unet.conv_out.register_forward_hook(
        steps.add
    )  # the last layer, which also runs if the halves run separately
    layers = attention_layers(unet)
    pairs = zip(originals.items(), layers, strict=True)
    processors = {name: ControlledProcessor(original, layer, control, steps) for (name, original), layer in pairs}
    unet.set_attn_processor(processors)
    try:
        yield steps
    finally:
        hook.remove()
        unet.set_attn_processor(originals)


class ConstantOutput(torch.nn.Module):
    """Replaces a projection whose input never changes by its output ``value``, B x T x D."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """The value; for a smaller batch its last rows, the conditional half."""
        return self.value[-len(text) :]


@dataclass(frozen=True)
class Projection:
    """The projection ``name`` (to_k or to_v) of an attention layer, and its ``output`` for the text of a batch."""

    attention: torch.nn.Module
    name: str
    output: ConstantOutput


def keys_and_values(nets: Iterable[torch.nn.Module], text: torch.Tensor) -> list[Projection]:
    """The keys and values of ``text`` B x T x D in every cross-attention layer of UNets and ControlNets."""
    projections = []
    for net in nets:
        states = text.to(net.conv_in.weight.dtype)
        for attention in (m for name, m in net.named_modules() if name.endswith("attn2")):
            for name in ("to_k", "to_v"):
                projections.append(Projection(attention, name, ConstantOutput(getattr(attention, name)(states))))
    return projections


@contextmanager
def cached_cross_attention(projections: Iterable[Projection]) -> Iterator[None]:
    """Within this block the layers use these keys and values instead of computing them; the results are identical."""
    originals = [(p, getattr(p.attention, p.name)) for p in projections]
    try:
        for p in projections:
            setattr(p.attention, p.name, p.output)
        yield
    finally:
        for p, projection in originals:
            setattr(p.attention, p.name, projection)
