"""Prompt-to-prompt: how the attention of a source prompt goes over to a target prompt.

Hertz 2022 (Prompt-to-Prompt Image Editing with Cross Attention Control, arXiv 2208.01626). Positions count tokens, the
beginning token included; a word may be several of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from harmony.core.errors import UserError
from harmony.models.attention import AttentionControl, Layer, conditional, controlled
from harmony.models.backbone import Backbone
from harmony.sampling.ddim import step, timesteps
from harmony.sampling.null_text import denoiser

Span = tuple[int, int]  # first position of a word, and the one behind its last


def spans(prompt: str, encode: Callable[[str], Sequence[int]], length: int) -> dict[int, Span]:
    """Number of each word (as white space separates them) -> where its tokens are; ``encode`` gives a word's tokens.

    UserError for a prompt of more than ``length`` - 2 tokens: its end would not be seen.
    """
    found, at = {}, 1
    for number, word in enumerate(prompt.split()):
        found[number] = (at, at + len(encode(word)))
        at = found[number][1]
    if at > length - 1:
        raise UserError(f"the prompt {prompt!r} has {at - 1} tokens, the model reads {length - 2}: shorten it")
    return found


def bare(word: str) -> str:
    """A word without the punctuation around it."""
    return word.strip(",.;:!?\"'") or word


def replacement(source: Sequence[Span], target: Sequence[Span], length: int) -> torch.Tensor:
    """A, length x length: target attention = source attention @ A. Word n of one prompt stands for word n of the other.

    Words of as many tokens go over one to one; otherwise each source token spreads evenly over the target's. What
    follows the last word (end, padding) moves along. Every row sums to 1: no attention is lost. UserError when the
    prompts differ in the number of words.
    """
    if len(source) != len(target):
        raise UserError(f"replacing wants as many words: the source has {len(source)}, the target {len(target)}")
    matrix = torch.zeros(length, length)
    matrix[0, 0] = 1
    for (a, b), (c, d) in zip(source, target, strict=True):
        if b - a == d - c:
            matrix[range(a, b), range(c, d)] = 1
        else:
            matrix[a:b, c:d] = 1 / (d - c)
    end, shift = (source[-1][1], target[-1][1] - source[-1][1]) if source else (1, 0)
    for i in range(end, length):
        matrix[i, min(i + shift, length - 1)] = 1
    return matrix


def alignment(source: Sequence[int], target: Sequence[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(source position of each target position, int64; whether it has one, bool), ``length`` each.

    A global alignment of the tokens (match 1, mismatch -1, gap 0; Needleman 1970), so that words that were
    added keep an attention of their own. Positions past the end belong to themselves.
    """
    n, m = len(source), len(target)
    score = [[0] * (m + 1) for _ in range(n + 1)]
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            match = 1 if source[i - 1] == target[j - 1] else -1
            score[i][j] = max(score[i - 1][j - 1] + match, score[i - 1][j], score[i][j - 1])
    index, known = torch.arange(length), torch.ones(length, dtype=torch.bool)
    i, j = n, m
    while j > 0:
        if i > 0 and source[i - 1] == target[j - 1] and score[i][j] == score[i - 1][j - 1] + 1:
            i, j = i - 1, j - 1
            index[j] = i
        elif i > 0 and score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            j -= 1
            known[j] = False
    return index, known


@dataclass(frozen=True)
class Edit:
    """What becomes of the source's cross-attention P (heads x N x T) in a target prompt.

    ``matrix`` T x T (replace), or ``index`` and ``known`` (refine); ``factors`` T: what each target position's
    attention is multiplied by in the end (reweight). Not normalised again.
    """

    factors: torch.Tensor
    matrix: torch.Tensor | None = None
    index: torch.Tensor | None = None
    known: torch.Tensor | None = None

    def __call__(self, source: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Probabilities of the target row, from those of the source and its own."""
        if self.matrix is not None:
            made = source @ self.matrix.to(source)
        else:
            known = self.known.to(source.device)
            made = torch.where(known, source[..., self.index.to(source.device)], own)
        return made * self.factors.to(source)


def kind_of(source: str, target: str) -> str:
    """``replace`` when the prompts have as many words and differ, ``refine`` when words were added or left out,
    ``reweight`` when they are the same.
    """
    a, b = source.split(), target.split()
    if a == b:
        return "reweight"
    return "replace" if len(a) == len(b) else "refine"


def edit_between(
    source: str,
    target: str,
    encode: Callable[[str], Sequence[int]],
    length: int,
    factors: dict[str, float] | None = None,
) -> Edit:
    """The edit from ``source`` to ``target``; ``factors``: word of the target -> what multiplies its attention.

    UserError for a factor of a word that is not there.
    """
    words = {prompt: spans(prompt, encode, length) for prompt in (source, target)}
    weights = torch.ones(length)
    for word, factor in (factors or {}).items():
        places = [n for n, other in enumerate(target.split()) if bare(other) == bare(word)]
        if not places:
            raise UserError(f"reweight.{word}: the target {target!r} has no such word")
        for n in places:
            weights[slice(*words[target][n])] = factor
    if kind_of(source, target) == "replace":
        return Edit(weights, matrix=replacement([*words[source].values()], [*words[target].values()], length))
    begin, end = [-1], [-2]  # stand for the tokens around the words
    ids = [begin + [i for word in prompt.split() for i in encode(word)] + end for prompt in (source, target)]
    index, known = alignment(*ids, length)
    return Edit(weights, index=index, known=known)


# --- at work


class PromptToPrompt:
    """The control that leads ``edits``, one for each target prompt; row 0 is the source, which is never changed.

    Cross-attention is edited in the first ``cross`` steps. Self-attention of layers with at most ``tokens`` positions
    is the source's in the first ``own``: it holds the layout. ``maps``: cross-attention over so many positions, of the
    down and up blocks, is kept in ``seen`` (K x positions x T, summed over layers, heads and steps).
    """

    def __init__(self, edits: Sequence[Edit], cross: int, own: int, tokens: int = 32 * 32, maps: int | None = None):
        self.edits, self.cross, self.own, self.tokens, self.maps = list(edits), cross, own, tokens, maps
        self.seen: torch.Tensor | float = 0.0

    def keeps(self, layer: Layer, tokens: int) -> bool:
        """Whether this layer's maps are collected."""
        return layer.cross and tokens == self.maps and layer.place != "mid"

    def wants(self, layer: Layer, tokens: int, step: int) -> bool:
        if layer.cross:
            return step < self.cross or self.keeps(layer, tokens)
        return step < self.own and tokens <= self.tokens

    def __call__(self, probabilities: torch.Tensor, layer: Layer, step: int) -> torch.Tensor:
        prompts = len(self.edits) + 1
        rows = conditional(probabilities, prompts)
        if step < (self.cross if layer.cross else self.own):
            source = rows[0]
            edited = (e(source, row) for e, row in zip(self.edits, rows[1:], strict=True))
            rows = torch.stack([source, *(edited if layer.cross else [source] * len(self.edits))])
            probabilities = torch.cat([probabilities[:-prompts], rows])
        if self.keeps(layer, rows.shape[2]):
            self.seen = self.seen + rows.detach().sum(1, dtype=torch.float32)  # bfloat16 loses what is added late
        return probabilities


@dataclass(frozen=True)
class LocalBlend:
    """Keeps the source wherever neither prompt's chosen words look: the edit stays local.

    ``words`` K x T: 1 in the columns of each prompt's words. From step ``start`` on, latents outside the mask are the
    source's; the mask is where the maps so far, relative to their largest, exceed ``threshold`` in the source or in the
    target.
    """

    words: torch.Tensor
    start: int
    threshold: float = 0.3

    def masks(self, seen: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """K x height x width, bool, from maps K x positions x T: that of each prompt on its own."""
        heat = (seen * self.words.to(seen)[:, None]).sum(-1)
        side = math.isqrt(heat.shape[1])
        heat = F.max_pool2d(heat.view(-1, 1, side, side), 3, stride=1, padding=1)
        heat = F.interpolate(heat, (height, width), mode="nearest")[:, 0]
        return heat > self.threshold * heat.amax((1, 2), keepdim=True)

    def __call__(self, z: torch.Tensor, seen: torch.Tensor, step: int) -> torch.Tensor:
        """Latents K x C x h x w after ``step``, with the source's outside the masks."""
        if step < self.start:
            return z
        masks = self.masks(seen, *z.shape[-2:])
        return torch.where((masks[:1] | masks)[:, None], z, z[:1])


@torch.no_grad()
def edit_latents(
    backbone: Backbone,
    z: torch.Tensor,
    texts: Sequence[torch.Tensor],
    nulls: Sequence[torch.Tensor],
    w: float,
    control: AttentionControl,
    blend: LocalBlend | None = None,
) -> torch.Tensor:
    """Clean latents K x C x h x w of source and targets; the noise ``z`` is 1 x or K x C x h x w.

    For each step ``texts`` K x T x D, the source's first, and ``nulls``, an empty prompt 1 x T x D (or K x T x D). Both
    halves of the guidance are one call of the UNet, so that a call is a step.
    """
    eps, abar, offset = denoiser(backbone), backbone.alphas_cumprod, backbone.scheduler.config.steps_offset
    gap, z = len(abar) // len(nulls), z.expand(len(texts[0]), -1, -1, -1)
    with controlled(backbone.unet, control) as steps:
        for text, null, t in zip(texts, nulls, timesteps(len(nulls), offset, len(abar)), strict=True):
            at = steps.taken
            e_u, e_c = eps(torch.cat([z, z]), t, torch.cat([null.expand_as(text), text])).chunk(2)
            z = step(z, e_u + w * (e_c - e_u), t, t - gap, abar)
            if blend is not None:
                z = blend(z, control.seen, at)
    return z
