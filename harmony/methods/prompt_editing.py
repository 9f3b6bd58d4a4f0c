"""Editing a photograph by its words: invert it, then lead a target prompt by its source.

Mokady 2022 and Hertz 2022 joined. Inversion is the expensive part and does not depend on the target: it is kept in a
file, and a further edit of the same picture costs its sampling only.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from harmony.core.errors import UserError
from harmony.core.files import write_tensors
from harmony.models.attention import map_side
from harmony.models.backbone import DIFFUSION, Backbone
from harmony.pixels.images import from_model, to_model
from harmony.sampling.ddim import invert
from harmony.sampling.null_text import Search, denoiser, null_texts, replay
from harmony.sampling.prompt_to_prompt import (
    Edit,
    LocalBlend,
    PromptToPrompt,
    Span,
    alignment,
    build_edit,
    edit_kind,
    edit_latents,
    spans,
)

START = 0.2  # share of the steps after which an edit is kept local


@dataclass(frozen=True)
class Inversion:
    """What brings a picture back: ``noise`` 1 x C x h x w and an empty prompt 1 x T x D for each step.

    ``latent`` 1 x C x h x w is the picture itself, encoded.
    """

    latent: torch.Tensor
    noise: torch.Tensor
    nulls: list[torch.Tensor]


@torch.no_grad()
def encode(backbone: Backbone, images: Sequence[np.ndarray]) -> torch.Tensor:
    """B pictures uint8 R x R x 3 -> latents B x C x h x w, the posterior's mean."""
    return backbone.latent(backbone.moments(to_model(np.stack(images)).to(backbone.device)))


def invert_pictures(
    backbone: Backbone,
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    steps: int = 50,
    w: float = 7.5,
    inner: int = 10,
    say: Callable[[str], None] = lambda line: None,
) -> list[Inversion]:
    """DDIM inversion of each picture under its prompt without guidance, then ``null_texts`` for guidance ``w``.

    ``inner=0`` is the fast mode: the condition itself stands for the empty prompt, so that guidance is inert in the
    source's row and the reconstruction is that of plain DDIM (Miyake 2023).
    """
    trajectory, text = trajectories(backbone, images, prompts, steps)
    if inner == 0:
        nulls = [text] * steps
    else:
        abar, offset = backbone.alphas_cumprod, backbone.scheduler.config.steps_offset
        search, empty = Search(lambda i, n: inner), backbone.prompt([""])
        nulls = null_texts(denoiser(backbone), trajectory, [text] * steps, empty, w, abar, offset, search, say)
    ends = zip(trajectory[0].split(1), trajectory[-1].split(1), strict=True)
    return [Inversion(*pair, [null[i : i + 1] for null in nulls]) for i, pair in enumerate(ends)]


@torch.no_grad()
def trajectories(
    backbone: Backbone, images: Sequence[np.ndarray], prompts: Sequence[str], steps: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(z_0 .. z_N, each B x C x h x w; the prompts' states B x T x D) of DDIM inversion without guidance."""
    eps, text = denoiser(backbone), backbone.prompt(list(prompts))
    offset = backbone.scheduler.config.steps_offset
    return invert(lambda z, t: eps(z, t, text), encode(backbone, images), steps, backbone.alphas_cumprod, offset), text


def inversion_key(backbone: Backbone, image: np.ndarray, *settings) -> str:
    """Hash of all that an inversion depends on: the backbone's weights, its learnt words, pixels, prompt and
    settings.
    """
    digest = hashlib.sha256(repr([[backbone.hash(part) for part in DIFFUSION], image.shape, settings]).encode())
    for word, tokens in backbone.words.items():
        digest.update(repr((word, tokens)).encode())
        digest.update(backbone.text_encoder.get_input_embeddings().weight[backbone.encode(word)].float().cpu().numpy())
    digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()[:16]


def kept_inversion(
    folder: Path,
    backbone: Backbone,
    image: np.ndarray,
    prompt: str,
    steps: int,
    w: float,
    inner: int,
    say: Callable[[str], None] = lambda line: None,
) -> Inversion:
    """``invert_pictures`` of one, read from ``folder`` if it has been done before; a damaged file is made anew."""
    file = folder / f"{inversion_key(backbone, image, prompt, steps, w, inner)}.safetensors"
    try:
        state = {name: value.to(backbone.device, backbone.precise_dtype) for name, value in load_file(file).items()}
        return Inversion(state["latent"], state["noise"], list(state["nulls"].split(1)))
    except (OSError, SafetensorError, KeyError):
        pass
    (made,) = invert_pictures(backbone, [image], [prompt], steps, w, inner, say)
    state = {"latent": made.latent, "noise": made.noise, "nulls": torch.cat(made.nulls)}
    write_tensors(file, {name: value.float() for name, value in state.items()})
    return made


@torch.no_grad()
def reconstruct(
    backbone: Backbone, inversions: Sequence[Inversion], prompts: Sequence[str], w: float
) -> list[np.ndarray]:
    """uint8 R x R x 3 each: the pictures as guided sampling under their prompts gives them back."""
    abar, offset = backbone.alphas_cumprod, backbone.scheduler.config.steps_offset
    noise = torch.cat([inversion.noise for inversion in inversions])
    nulls = [torch.cat(rows) for rows in zip(*(inversion.nulls for inversion in inversions), strict=True)]
    z = replay(denoiser(backbone), noise, backbone.prompt(list(prompts)), nulls, w, abar, offset)[-1]
    return list(from_model(backbone.decode(z)))


# --- editing


@dataclass(frozen=True)
class Mode:
    """How strongly the source leads: shares of the steps in which cross- and self-attention are the source's, what the
    attention of the words that change is multiplied by, and whether the edit is kept where they look.
    """

    cross: float
    own: float
    factor: float
    local: bool


MODES = {  # shares as in the notebooks of Hertz 2022 and Mokady 2022, factors milder than theirs
    "replace": Mode(0.8, 0.5, 1.0, True),
    "insert": Mode(0.8, 0.6, 1.0, True),
    "style": Mode(0.8, 0.7, 2.0, False),
    "reweight": Mode(0.8, 0.6, 1.0, False),
}
KINDS = {"replace": "replace", "refine": "insert", "reweight": "reweight"}  # mode of each kind of edit


def mode_of(source: str, target: str) -> str:
    """The mode that two prompts mean: as many words, added or missing words, the same words."""
    return KINDS[edit_kind(source, target)]


@dataclass(frozen=True)
class Changes:
    """Words that one prompt alone has, by their numbers in it: ``gone`` of the source, ``come`` of the target."""

    gone: list[int]
    come: list[int]


def changes(source: str, target: str) -> Changes:
    """The words in which two prompts differ."""
    a, b = source.split(), target.split()
    if len(a) == len(b):
        differ = [n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        return Changes(differ, differ)
    ids = {word: i for i, word in enumerate(dict.fromkeys(a + b))}
    pairs = [[ids[word] for word in words] for words in (a, b)]
    come, gone = (
        [n for n, known in enumerate(alignment(*order, max(len(a), len(b)))[1][: len(order[1])].tolist()) if not known]
        for order in (pairs, pairs[::-1])
    )
    return Changes(gone, come)


@dataclass(frozen=True)
class Plan:
    """An edit that is ready to be made: both prompts, the mode, what becomes of the attention, where the words are
    (``places``, see ``spans``), and of a local one the columns that it is kept to, 2 x T.
    """

    prompts: tuple[str, str]
    mode: Mode
    edit: Edit
    places: list[dict[int, Span]]
    looked_at: torch.Tensor | None


def plan(
    backbone: Backbone,
    source: str,
    target: str,
    mode: Mode,
    factors: dict[str, float] | None = None,
    look_at: Sequence[Sequence[int]] | None = None,
) -> Plan:
    """``factors``: word of the target -> what multiplies its attention, in the place of the mode's for words that come.
    ``look_at``: numbers of the words of each prompt that a local edit is kept to; None = those that change.

    UserError for a prompt that is too long, a word that is not there, a local edit with nothing to look at.
    """
    length, words = backbone.tokenizer.model_max_length, target.split()
    places = [spans(prompt, backbone.encode, length) for prompt in (source, target)]
    changed = changes(source, target)
    usual = {words[n]: mode.factor for n in changed.come if mode.factor != 1}
    edit = build_edit(source, target, backbone.encode, length, usual if factors is None else factors)
    if not mode.local:
        return Plan((source, target), mode, edit, places, None)
    columns = torch.zeros(2, length)
    for row, numbers, at in zip(columns, look_at or (changed.gone, changed.come), places, strict=True):
        for n in numbers:
            row[slice(*at[n])] = 1
    if not columns.any():
        raise UserError("a local edit wants words to look at: prompts that differ, or local=false")
    return Plan((source, target), mode, edit, places, columns)


@dataclass(frozen=True)
class Edited:
    """``pictures`` uint8 R x R x 3, source first, then target; ``masks`` bool R x R of each (None: not local), their
    union being where the target may differ; ``maps``: for both prompts, each word and where it looks, h x w in [0, 1].
    """

    pictures: list[np.ndarray]
    masks: list[np.ndarray] | None
    maps: list[list[tuple[str, np.ndarray]]] = field(default_factory=list)


def edit_picture(backbone: Backbone, inversion: Inversion, planned: Plan, w: float, threshold: float = 0.3) -> Edited:
    """The picture under its own prompt and under the target, whose attention is led by the former.

    ``threshold``: share of the largest attention above which a place belongs to a local edit.
    """
    mode, steps, side = planned.mode, len(inversion.nulls), backbone.resolution // backbone.factor
    control = PromptToPrompt(
        [planned.edit], int(mode.cross * steps), int(mode.own * steps), map_tokens=map_side(backbone.unet, side) ** 2
    )
    blend = LocalBlend(planned.looked_at, int(START * steps), threshold) if mode.local else None
    text = backbone.prompt(list(planned.prompts))
    z = edit_latents(backbone, inversion.noise, [text] * steps, inversion.nulls, w, control, blend)
    masks = None
    if blend is not None:
        small = F.interpolate(
            blend.masks(control.map_sum, side, side)[:, None].float(), backbone.resolution, mode="nearest"
        )
        masks = [mask.numpy() > 0 for mask in small[:, 0].cpu()]
    maps = [looks(*item) for item in zip(control.map_sum, planned.prompts, planned.places, strict=True)]
    return Edited(list(from_model(backbone.decode(z))), masks, maps)


def looks(seen: torch.Tensor, prompt: str, places: dict[int, Span]) -> list[tuple[str, np.ndarray]]:
    """Each word of ``prompt`` and its share of ``seen``, positions x T, h x w in [0, 1] relative to its largest."""
    side, found = math.isqrt(len(seen)), []
    for n, word in enumerate(prompt.split()):
        heat = seen[:, slice(*places[n])].sum(1).view(side, side).float().cpu()
        found.append((word, (heat / heat.max().clamp(min=1e-12)).numpy()))
    return found
