"""Prompt-to-prompt: the attention of a source prompt is transferred to a target prompt.

Hertz 2022 (Prompt-to-Prompt Image Editing with Cross Attention Control, arXiv 2208.01626). Positions count tokens,
the beginning token included; a word may have several tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from harmony.core.errors import UserError
from harmony.models.attention import AttentionControl, Layer, conditional_rows, control_attention
from harmony.models.backbone import Backbone
from harmony.sampling.ddim import step, timesteps
from harmony.sampling.null_text import denoiser

Span = tuple[int, int]  # first position of a word, and the position after its last


def spans(prompt: str, encode: Callable[[str], Sequence[int]], length: int) -> dict[int, Span]:
    """Map the number of each word (separated by white space) to its token positions.

    ``encode`` returns the tokens of a word. UserError for a prompt of more than ``length`` - 2 tokens, whose end would
    be cut off.
    """
    positions, start = {}, 1
    for number, word in enumerate(prompt.split()):
        positions[number] = (start, start + len(encode(word)))
        start = positions[number][1]
    if start > length - 1:
        raise UserError(f"the prompt {prompt!r} has {start - 1} tokens, the model reads {length - 2}: shorten it")
    return positions


def strip_punctuation(word: str) -> str:
    """A word in small letters, without the punctuation around it."""
    return word.lower().strip(",.;:!?\"'") or word


def replacement(source: Sequence[Span], target: Sequence[Span], length: int) -> torch.Tensor:
    """The matrix A, length x length, such that target attention = source attention @ A.

    Word n of the source corresponds to word n of the target. If both words have equally many tokens, they correspond
    one to one; otherwise each source token is spread evenly over the target tokens. The tokens after the last word
    (end, padding) are shifted. Every row sums to 1, so no attention is lost. UserError if the prompts differ in the
    number of words.
    """
    if len(source) != len(target):
        raise UserError(f"replace needs equally many words: the source has {len(source)}, the target {len(target)}")
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
    """Align tokens: (source position of each target position, int64; whether it has one, bool), ``length`` each.

    A global alignment of the tokens (match 1, mismatch -1, gap 0; Needleman 1970), so that words that are new in the
    target keep their own attention. Of a word that stands twice in the target the last is paired, where the released
    code pairs the first: both alignments score the same. Positions after the end map to themselves.
    """
    n, m = len(source), len(target)
    score = [[0] * (m + 1) for _ in range(n + 1)]
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            match = 1 if source[i - 1] == target[j - 1] else -1
            score[i][j] = max(score[i - 1][j - 1] + match, score[i - 1][j], score[i][j - 1])
    index, has_source = torch.arange(length), torch.ones(length, dtype=torch.bool)
    i, j = n, m
    while j > 0:
        if i > 0 and source[i - 1] == target[j - 1] and score[i][j] == score[i - 1][j - 1] + 1:
            i, j = i - 1, j - 1
            index[j] = i
        elif i > 0 and score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            j -= 1
            has_source[j] = False
    return index, has_source


@dataclass(frozen=True)
class Edit:
    """How the source's cross-attention P (heads x N x T) becomes that of a target prompt.

    ``matrix`` T x T (replace), or ``index`` and ``has_source`` (refine); then the attention of each target position is
    multiplied by ``factors`` T (reweight). The result is not normalized.
    """

    factors: torch.Tensor
    matrix: torch.Tensor | None = None
    index: torch.Tensor | None = None
    has_source: torch.Tensor | None = None

    def __call__(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The edited probabilities of the target row, from those of the source row and of the target row."""
        if self.matrix is not None:
            result = source @ self.matrix.to(source)
        else:
            has_source = self.has_source.to(source.device)
            result = torch.where(has_source, source[..., self.index.to(source.device)], target)
        return result * self.factors.to(source)


def edit_kind(source: str, target: str) -> str:
    """The kind of an edit: ``reweight`` for equal prompts, ``replace`` for equally many words, else ``refine``.

    Capitals make no difference: CLIP's tokens are those of small letters.
    """
    a, b = source.lower().split(), target.lower().split()
    if a == b:
        return "reweight"
    return "replace" if len(a) == len(b) else "refine"


def build_edit(
    source: str,
    target: str,
    encode: Callable[[str], Sequence[int]],
    length: int,
    factors: dict[str, float] | None = None,
) -> Edit:
    """Build the edit from ``source`` to ``target``; ``factors`` maps a word of the target to its attention factor.

    UserError for a factor of a word that the target does not contain.
    """
    words = {prompt: spans(prompt, encode, length) for prompt in (source, target)}
    weights = torch.ones(length)
    for word, factor in (factors or {}).items():
        places = [n for n, other in enumerate(target.split()) if strip_punctuation(other) == strip_punctuation(word)]
        if not places:
            raise UserError(f"reweight.{word}: the target {target!r} has no such word")
        for n in places:
            weights[slice(*words[target][n])] = factor
    if edit_kind(source, target) == "replace":
        return Edit(weights, matrix=replacement([*words[source].values()], [*words[target].values()], length))
    begin, end = [-1], [-2]  # in place of the tokens around the words
    ids = [begin + [i for word in prompt.split() for i in encode(word)] + end for prompt in (source, target)]
    index, has_source = alignment(*ids, length)
    return Edit(weights, index=index, has_source=has_source)


# --- sampling


class PromptToPrompt:
    """The attention control of ``edits``, one for each target prompt; row 0 is the source and never changes.

    In the first ``cross_steps`` steps cross-attention is edited. In the first ``self_steps`` steps the self-attention
    of layers with at most ``max_tokens`` positions is replaced by the source's, which fixes the layout. ``map_sum`` K x
    positions x T is the sum, over layers, heads and steps, of the cross-attention over ``map_tokens`` positions in the
    down and up blocks.
    """

    def __init__(
        self,
        edits: Sequence[Edit],
        cross_steps: int,
        self_steps: int,
        max_tokens: int = 32 * 32,
        map_tokens: int | None = None,
    ):
        self.edits, self.cross_steps, self.self_steps = list(edits), cross_steps, self_steps
        self.max_tokens, self.map_tokens = max_tokens, map_tokens
        self.map_sum: torch.Tensor | float = 0.0

    def collects(self, layer: Layer, tokens: int) -> bool:
        """Whether the maps of this layer are added to ``map_sum``."""
        return layer.is_cross and tokens == self.map_tokens and layer.place != "mid"

    def wants(self, layer: Layer, tokens: int, step: int) -> bool:
        if layer.is_cross:
            return step < self.cross_steps or self.collects(layer, tokens)
        return step < self.self_steps and tokens <= self.max_tokens

    def __call__(self, probabilities: torch.Tensor, layer: Layer, step: int) -> torch.Tensor:
        prompts = len(self.edits) + 1
        rows = conditional_rows(probabilities, prompts)
        if step < (self.cross_steps if layer.is_cross else self.self_steps):
            source = rows[0]
            targets = (e(source, row) for e, row in zip(self.edits, rows[1:], strict=True))
            rows = torch.stack([source, *(targets if layer.is_cross else [source] * len(self.edits))])
            probabilities = torch.cat([probabilities[:-prompts], rows])
        if self.collects(layer, rows.shape[2]):
            self.map_sum = self.map_sum + rows.detach().sum(
                1, dtype=torch.float32
            )  # a sum in bfloat16 would lose terms
        return probabilities


@dataclass(frozen=True)
class LocalBlend:
    """Keeps an edit local: latents outside the attention of the chosen words are those of the source.

    ``words`` K x T is 1 in the columns of each prompt's chosen words. From step ``start`` on, latents outside the mask
    are the source's. The mask is where the attention maps so far, relative to their maximum, exceed ``threshold`` in
    the source or in the target.
    """

    words: torch.Tensor
    start: int
    threshold: float = 0.3

    def masks(self, map_sum: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The mask of each prompt, bool K x height x width, from maps K x positions x T."""
        heat = (map_sum * self.words.to(map_sum)[:, None]).sum(-1)
        side = math.isqrt(heat.shape[1])
        heat = F.max_pool2d(heat.view(-1, 1, side, side), 3, stride=1, padding=1)
        heat = F.interpolate(heat, (height, width), mode="nearest")[:, 0]
        return heat > self.threshold * heat.amax((1, 2), keepdim=True)

    def __call__(self, z: torch.Tensor, map_sum: torch.Tensor, step: int) -> torch.Tensor:
        """Replace latents K x C x h x w outside the masks by the source's."""
        if step < self.start:
            return z
        masks = self.masks(map_sum, *z.shape[-2:])
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
    """Sample clean latents K x C x h x w of source and targets; the noise ``z`` is 1 x or K x C x h x w.

    For each step ``texts`` has K x T x D, the source first, and ``nulls`` an empty prompt 1 x T x D (or K x T x D).
    Both halves of the guidance are one call of the UNet, so that a call is a step.
    """
    eps, abar, offset = denoiser(backbone), backbone.alphas_cumprod, backbone.scheduler.config.steps_offset
    gap, z = len(abar) // len(nulls), z.expand(len(texts[0]), -1, -1, -1)
    with control_attention(backbone.unet, control) as steps:
        for text, null, t in zip(texts, nulls, timesteps(len(nulls), offset, len(abar)), strict=True):
            index = steps.number
            e_u, e_c = eps(torch.cat([z, z]), t, torch.cat([null.expand_as(text), text])).chunk(2)
            z = step(z, e_u + w * (e_c - e_u), t, t - gap, abar)
            if blend is not None:
                z = blend(z, control.map_sum, index)
    return z
