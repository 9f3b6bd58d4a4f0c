"""Edits a photograph by its prompt: invert it, then sample a target prompt with the attention of the source.

This joins Mokady 2022 and Hertz 2022. Inversion is the expensive part and does not depend on the target, so it is kept
in a file: a further edit of the same picture costs its sampling only.
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

START = 0.2  # share of the steps after which an edit is restricted to its masks


@dataclass(frozen=True)
class Inversion:
    """The inversion of a picture: ``noise`` 1 x C x h x w and an empty prompt 1 x T x D for each step.

    ``latent`` 1 x C x h x w is the encoded picture.
    """

    latent: torch.Tensor
    noise: torch.Tensor
    nulls: list[torch.Tensor]


@torch.no_grad()
def encode(backbone: Backbone, images: Sequence[np.ndarray]) -> torch.Tensor:
    """Encode B pictures uint8 R x R x 3 to latents B x C x h x w, the mean of the posterior."""
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
    """Invert each picture by DDIM under its prompt without guidance, then find ``null_texts`` for guidance ``w``.

    ``inner=0`` is the fast mode: the prompt itself takes the place of the empty prompt, so that guidance has no effect
    on the source and the reconstruction is that of plain DDIM (Miyake 2023).
    """
    trajectory, text = invert_latents(backbone, images, prompts, steps)
    if inner == 0:
        nulls = [text] * steps
    else:
        abar, offset = backbone.alphas_cumprod, backbone.scheduler.config.steps_offset
        search, empty_text = Search(lambda i, n: inner), backbone.prompt([""])
        nulls = null_texts(denoiser(backbone), trajectory, [text] * steps, empty_text, w, abar, offset, search, say)
    pairs = zip(trajectory[0].split(1), trajectory[-1].split(1), strict=True)
    return [Inversion(*pair, [null[i : i + 1] for null in nulls]) for i, pair in enumerate(pairs)]


@torch.no_grad()
def invert_latents(
    backbone: Backbone, images: Sequence[np.ndarray], prompts: Sequence[str], steps: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """DDIM inversion without guidance: (z_0 .. z_N, each B x C x h x w; the prompts' states B x T x D)."""
    eps, text = denoiser(backbone), backbone.prompt(list(prompts))
    offset = backbone.scheduler.config.steps_offset
    return invert(lambda z, t: eps(z, t, text), encode(backbone, images), steps, backbone.alphas_cumprod, offset), text


def hash_inversion(backbone: Backbone, image: np.ndarray, *settings) -> str:
    """Hash of all that an inversion depends on: weights, learned words, pixels, prompt and settings."""
    digest = hashlib.sha256(repr([[backbone.hash(part) for part in DIFFUSION], image.shape, settings]).encode())
    for word, tokens in backbone.words.items():
        digest.update(repr((word, tokens)).encode())
        digest.update(backbone.text_encoder.get_input_embeddings().weight[backbone.encode(word)].float().cpu().numpy())
    digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()[:16]


def load_or_invert(
    folder: Path,
    backbone: Backbone,
    image: np.ndarray,
    prompt: str,
    steps: int,
    w: float,
    inner: int,
    say: Callable[[str], None] = lambda line: None,
) -> Inversion:
    """The inversion of one picture, read from ``folder`` if it is there; a damaged file is written again."""
    file = folder / f"{hash_inversion(backbone, image, prompt, steps, w, inner)}.safetensors"
    try:
        state = {name: value.to(backbone.device, backbone.precise_dtype) for name, value in load_file(file).items()}
        return Inversion(state["latent"], state["noise"], list(state["nulls"].split(1)))
    except (OSError, SafetensorError, KeyError):
        pass
    (inversion,) = invert_pictures(backbone, [image], [prompt], steps, w, inner, say)
    state = {"latent": inversion.latent, "noise": inversion.noise, "nulls": torch.cat(inversion.nulls)}
    write_tensors(file, {name: value.float() for name, value in state.items()})
    return inversion


@torch.no_grad()
def reconstruct(
    backbone: Backbone, inversions: Sequence[Inversion], prompts: Sequence[str], w: float
) -> list[np.ndarray]:
    """Reconstruct pictures, uint8 R x R x 3 each, by guided sampling under their prompts."""
    abar, offset = backbone.alphas_cumprod, backbone.scheduler.config.steps_offset
    noise = torch.cat([inversion.noise for inversion in inversions])
    nulls = [torch.cat(rows) for rows in zip(*(inversion.nulls for inversion in inversions), strict=True)]
    z = replay(denoiser(backbone), noise, backbone.prompt(list(prompts)), nulls, w, abar, offset)[-1]
    return list(from_model(backbone.decode(z)))


# --- editing


@dataclass(frozen=True)
class Mode:
    """How strongly the source guides an edit.

    ``cross_attention_steps``, ``self_attention_steps``: shares of the steps in which cross- and self-attention are the
    source's. ``factor``: multiplies the attention of new words. ``local``: the edit is restricted to where the changed
    words look.
    """

    cross_attention_steps: float
    self_attention_steps: float
    factor: float
    local: bool


MODES = {  # shares as in the notebooks of Hertz 2022 and Mokady 2022, factors milder than theirs
    "replace": Mode(0.8, 0.5, 1.0, True),
    "insert": Mode(0.8, 0.6, 1.0, True),
    "style": Mode(0.8, 0.7, 2.0, False),
    "reweight": Mode(0.8, 0.6, 1.0, False),
}
KINDS = {"replace": "replace", "refine": "insert", "reweight": "reweight"}  # mode of each kind of edit


def find_mode(source: str, target: str) -> str:
    """The mode of the edit between two prompts: equally many words, added or missing words, or the same words."""
    return KINDS[edit_kind(source, target)]


@dataclass(frozen=True)
class Changes:
    """Positions of the words that only one prompt has: of ``source`` and of ``target``."""

    source: list[int]
    target: list[int]


def compare_prompts(source: str, target: str) -> Changes:
    """The words in which two prompts differ, capitals aside."""
    a, b = source.lower().split(), target.lower().split()
    if len(a) == len(b):
        positions = [n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        return Changes(positions, positions)
    ids = {word: i for i, word in enumerate(dict.fromkeys(a + b))}
    pair = [[ids[word] for word in words] for words in (a, b)]
    new_words, old_words = (
        [n for n, match in enumerate(alignment(*order, max(len(a), len(b)))[1][: len(order[1])].tolist()) if not match]
        for order in (pair, pair[::-1])
    )
    return Changes(old_words, new_words)


@dataclass(frozen=True)
class Plan:
    """An edit that is ready to run.

    ``edit``: the changes of the attention. ``places``: the tokens of each prompt's words, see ``spans``. ``columns``
    2 x T: the tokens that a local edit looks at.
    """

    prompts: tuple[str, str]
    mode: Mode
    edit: Edit
    places: list[dict[int, Span]]
    columns: torch.Tensor | None


def plan_edit(
    backbone: Backbone,
    source: str,
    target: str,
    mode: Mode,
    factors: dict[str, float] | None = None,
    look_at: Sequence[Sequence[int]] | None = None,
) -> Plan:
    """Plan the edit of a picture from the prompt ``source`` to ``target``.

    ``factors``: word of the target -> factor of its attention; None: the factor of the mode for the new words.
    ``look_at``: positions of the words of each prompt to which a local edit is restricted; None: the words that change.

    UserError for a prompt that is too long, a missing word, or a local edit without words to look at.
    """
    length, words = backbone.tokenizer.model_max_length, target.split()
    places = [spans(prompt, backbone.encode, length) for prompt in (source, target)]
    changes = compare_prompts(source, target)
    if factors is None:
        factors = {words[n]: mode.factor for n in changes.target if mode.factor != 1}
    edit = build_edit(source, target, backbone.encode, length, factors)
    if not mode.local:
        return Plan((source, target), mode, edit, places, None)
    columns = torch.zeros(2, length)
    for row, positions, tokens in zip(columns, look_at or (changes.source, changes.target), places, strict=True):
        for n in positions:
            row[slice(*tokens[n])] = 1
    if not columns.any():
        raise UserError("a local edit needs words to look at: give prompts that differ, or local=false")
    return Plan((source, target), mode, edit, places, columns)


@dataclass(frozen=True)
class EditResult:
    """The pictures of an edit, uint8 R x R x 3: of the source, then of the target.

    ``masks`` bool R x R of each (None: not local); the target may differ in their union. ``maps``: for both prompts,
    each word and its attention, h x w in [0, 1].
    """

    pictures: list[np.ndarray]
    masks: list[np.ndarray] | None
    maps: list[list[tuple[str, np.ndarray]]] = field(default_factory=list)


def edit_picture(backbone: Backbone, inversion: Inversion, plan: Plan, w: float, threshold: float = 0.3) -> EditResult:
    """Sample the picture under its own prompt and, with the attention of that, under the target.

    ``threshold``: share of the largest attention above which a position belongs to a local edit.
    """
    mode, steps, side = plan.mode, len(inversion.nulls), backbone.resolution // backbone.factor
    control = PromptToPrompt(
        [plan.edit],
        int(mode.cross_attention_steps * steps),
        int(mode.self_attention_steps * steps),
        map_tokens=map_side(backbone.unet, side) ** 2,
    )
    blend = LocalBlend(plan.columns, int(START * steps), threshold) if mode.local else None
    text = backbone.prompt(list(plan.prompts))
    z = edit_latents(backbone, inversion.noise, [text] * steps, inversion.nulls, w, control, blend)
    masks = None
    if blend is not None:
        tensors = F.interpolate(
            blend.masks(control.map_sum, side, side)[:, None].float(), backbone.resolution, mode="nearest"
        )
        masks = [mask.numpy() > 0 for mask in tensors[:, 0].cpu()]
    maps = [split_maps(*item) for item in zip(control.map_sum, plan.prompts, plan.places, strict=True)]
    return EditResult(list(from_model(backbone.decode(z))), masks, maps)


def split_maps(attention: torch.Tensor, prompt: str, places: dict[int, Span]) -> list[tuple[str, np.ndarray]]:
    """Each word of ``prompt`` and its part of ``attention`` (positions x T), h x w, divided by its maximum."""
    side, maps = math.isqrt(len(attention)), []
    for n, word in enumerate(prompt.split()):
        heat = attention[:, slice(*places[n])].sum(1).view(side, side).float().cpu()
        maps.append((word, (heat / heat.max().clamp(min=1e-12)).numpy()))
    return maps
