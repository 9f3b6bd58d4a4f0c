"""Reads and checks the options of ``harmony.edit``, and makes the pictures that it writes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from omegaconf import DictConfig

from harmony.core.errors import UserError
from harmony.methods.prompt_editing import MODES, EditResult, Mode, find_mode
from harmony.pixels.color_profiles import from_srgb, read_photograph
from harmony.pixels.composites import paste_back
from harmony.pixels.images import Crop, grid, paste_crop, resize, square_around
from harmony.sampling.prompt_to_prompt import strip_punctuation

SHARES = ("cross_attention_steps", "self_attention_steps")  # null = those of the mode


def split_list(value: str | Iterable | None) -> list[str] | None:
    """The items of a list, or of ``a,b`` or ``[a, b]`` as typed; None for null."""
    if value is None:
        return None
    if isinstance(value, str):
        value = value.strip().removeprefix("[").removesuffix("]").split(",")
    return [str(item).strip() for item in value if str(item).strip()]


def read_factors(value: str | Mapping[str, float] | None) -> dict[str, float]:
    """Word -> factor of a mapping, or of ``{snowy: 3, <toy>: 0.5}`` as typed. UserError for anything else."""
    if not isinstance(value, str):
        value = ", ".join(f"{word}: {factor}" for word, factor in (value or {}).items())
    factors = {}
    for item in split_list(value.strip().removeprefix("{").removesuffix("}")):
        word, _, factor = item.rpartition(":")
        try:
            factors[word.strip(" '\"")] = float(factor)
        except ValueError:
            raise UserError(f"reweight={value}: give a word and a factor, reweight={{snowy: 3}}") from None
    return factors


@dataclass(frozen=True)
class EditInput:
    """The photograph, uint8 H x W x 3, the square of it that is edited, color profile and EXIF, notes on its colors."""

    image: np.ndarray
    crop: Crop
    profile: bytes | None = None
    notes: tuple[str, ...] = ()
    exif: bytes | None = None


def read_edit(cfg: DictConfig) -> EditInput:
    """Read and check the options of an edit. UserError for anything that does not fit."""
    if cfg.target is None:
        raise UserError("target=null: say what the photograph should show")
    if cfg.mode is not None and cfg.mode not in MODES:
        raise UserError(f"mode={cfg.mode}: choose one of {', '.join(MODES)}")
    photograph = read_photograph(cfg.image)
    image, colors = photograph.pixels, (photograph.profile, photograph.notes, photograph.exif)
    height, width = image.shape[:2]
    if cfg.square is None:
        middle = (width // 2, height // 2, width // 2 + 1, height // 2 + 1)
        return EditInput(image, square_around(middle, width, height), *colors)
    try:
        x0, y0, side = map(int, split_list(cfg.square))
        fits = min(x0, y0) >= 0 < side and x0 + side <= width and y0 + side <= height
    except ValueError:
        fits = False
    if not fits:
        raise UserError(f"square={cfg.square}: give x0,y0,side of a square inside the {width} x {height} photograph")
    return EditInput(image, Crop(x0, y0, side), *colors)


def choose_mode(cfg: DictConfig, factors: dict[str, float]) -> tuple[str, Mode]:
    """The name of the mode and its numbers; numbers of the command line override those of the mode."""
    prompt_mode = find_mode(cfg.source, cfg.target)
    name = cfg.mode or prompt_mode
    numbers = {key: cfg[key] for key in (*SHARES, "local") if cfg[key] is not None}
    if prompt_mode == "reweight" and not factors:
        raise UserError("source= and target= are the same words: change one, or give reweight={word: factor}")
    if name == "replace" and prompt_mode == "insert":
        raise UserError(
            f"mode=replace needs equally many words: the source has {len(cfg.source.split())}, the target "
            f"{len(cfg.target.split())}; leave out mode= to make the edit an insert"
        )
    return name, replace(MODES[name], **numbers)


def find_words(cfg: DictConfig) -> list[list[int]] | None:
    """The positions of the words ``look_at`` in each prompt. UserError for a word that neither prompt has."""
    if (words := split_list(cfg.look_at)) is None:
        return None
    prompts = [[strip_punctuation(word) for word in prompt.split()] for prompt in (cfg.source, cfg.target)]
    if missing_words := [word for word in words if not any(strip_punctuation(word) in prompt for prompt in prompts)]:
        raise UserError(
            f"look_at={missing_words[0]}: neither the source nor the target has this word; take one from a prompt"
        )
    return [[n for n, word in enumerate(prompt) if word in map(strip_punctuation, words)] for prompt in prompts]


def paste_edit(edit_input: EditInput, result: EditResult, paste: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """The photograph with the edit in it, and the mask of where it may differ (None: anywhere in the square).

    ``paste``: pixels outside the mask are those of the photograph.
    """
    photograph, crop = edit_input.image, edit_input.crop
    image = paste_crop(photograph, from_srgb(result.pictures[1], edit_input.profile), crop)
    if result.masks is None:
        return image, None
    region = np.zeros(photograph.shape[:2], bool)
    mask = (result.masks[0] | result.masks[1]).astype(np.float32)
    x0, y0, side = crop.x0, crop.y0, crop.side
    region[y0 : y0 + side, x0 : x0 + side] = resize(mask, side, side) > 0.5
    return paste_back(image, photograph, region) if paste else image, region


def draw_attention(result: EditResult, side: int) -> np.ndarray:
    """A sheet of each word's attention, drawn over the pictures: the source's words above, the target's below."""
    rows, titles = [], []
    for picture, maps in zip(result.pictures, result.maps, strict=True):
        brightness = (resize(heat, side, side).clip(0.1, 1)[..., None] for _, heat in maps)
        rows.append([picture, *(np.rint(picture * b).astype(np.uint8) for b in brightness)])
        titles.append(["", *(word for word, _ in maps)])
    blocks = [grid([row], names) for row, names in zip(rows, titles, strict=True)]
    width = max(block.shape[1] for block in blocks)
    return np.concatenate([np.pad(b, ((0, 0), (0, width - b.shape[1]), (0, 0)), constant_values=255) for b in blocks])
