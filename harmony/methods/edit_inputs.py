"""What ``harmony.edit`` is asked for, read and checked, and the pictures that it hands out."""

from dataclasses import dataclass, replace

import numpy as np
from omegaconf import DictConfig

from harmony.core.errors import UserError
from harmony.methods.prompt_editing import MODES, Edited, Mode, mode_of
from harmony.pixels.composites import paste_back
from harmony.pixels.images import Crop, grid, paste_crop, read_image, resize, square_around
from harmony.sampling.ddim import timesteps
from harmony.sampling.prompt_to_prompt import strip_punctuation

NUMBERS = {"guidance": float, "threshold": float, "cross": float, "own": float, "steps": int, "inner": int}
SWITCHES = ("local", "paste")


def split_list(value) -> list[str] | None:
    """``a,b`` or ``[a, b]`` as it was typed, or a list -> the items; None for null."""
    if value is None:
        return None
    if isinstance(value, str):
        value = value.strip().removeprefix("[").removesuffix("]").split(",")
    return [str(item).strip() for item in value if str(item).strip()]


def read_factors(value) -> dict[str, float]:
    """``{snowy: 3, <toy>: 0.5}`` as it was typed, or a mapping -> word and factor. UserError for anything else."""
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
    """The photograph, uint8 H x W x 3, and the square of it that is worked on."""

    image: np.ndarray
    crop: Crop


def read_edit(cfg: DictConfig) -> EditInput:
    """Read and check the options in ``cfg``. UserError in one line for anything that does not fit."""
    if cfg.target is None:
        raise UserError("target=null: say what the photograph shall show")
    if cfg.mode is not None and cfg.mode not in MODES:
        raise UserError(f"mode={cfg.mode}: choose one of {', '.join(MODES)}")
    for name, kind in NUMBERS.items():
        if type(cfg[name]) not in (int, kind, *([type(None)] if name in ("cross", "own") else ())):
            raise UserError(f"{name}={cfg[name]}: give {'a whole number' if kind is int else 'a number'}")
    for name in ("cross", "own", "threshold"):
        if cfg[name] is not None and not 0 <= cfg[name] <= 1:
            raise UserError(f"{name}={cfg[name]}: give a share between 0 and 1")
    for name in SWITCHES:
        if cfg[name] not in (None, True, False):
            raise UserError(f"{name}={cfg[name]}: give true or false")
    if cfg.inner < 0:
        raise UserError(f"inner={cfg.inner}: give a number of steps, 0 for the fast mode")
    timesteps(cfg.steps)
    image = read_image(cfg.image)
    height, width = image.shape[:2]
    if cfg.square is None:
        middle = (width // 2, height // 2, width // 2 + 1, height // 2 + 1)
        return EditInput(image, square_around(middle, width, height))
    try:
        x0, y0, side = map(int, split_list(cfg.square))
        fits = min(x0, y0) >= 0 < side and x0 + side <= width and y0 + side <= height
    except ValueError:
        fits = False
    if not fits:
        raise UserError(f"square={cfg.square}: give x0,y0,side of a square inside the {width} x {height} photograph")
    return EditInput(image, Crop(x0, y0, side))


def mode_and_numbers(cfg: DictConfig, factors: dict[str, float]) -> tuple[str, Mode]:
    """The name of the mode and its numbers, those of the command line before its own."""
    meant = mode_of(cfg.source, cfg.target)
    name = cfg.mode or meant
    numbers = {key: cfg[key] for key in ("cross", "own", "local") if cfg[key] is not None}
    if meant == "reweight" and not factors:
        raise UserError("source= and target= are the same words: change one, or give reweight={word: factor}")
    if name == "replace" and meant == "insert":
        raise UserError(
            f"mode=replace wants as many words: the source has {len(cfg.source.split())}, the target "
            f"{len(cfg.target.split())}; leave mode= out and the edit is an insert"
        )
    return name, replace(MODES[name], **numbers)


def words_to_look_at(cfg: DictConfig) -> list[list[int]] | None:
    """The numbers of the words ``look_at`` in each prompt. UserError for one that neither has."""
    if (wanted := split_list(cfg.look_at)) is None:
        return None
    prompts = [[strip_punctuation(word) for word in prompt.split()] for prompt in (cfg.source, cfg.target)]
    if unknown := [word for word in wanted if not any(strip_punctuation(word) in words for words in prompts)]:
        raise UserError(f"look_at={unknown[0]}: neither the source nor the target has this word")
    return [[n for n, word in enumerate(words) if word in map(strip_punctuation, wanted)] for words in prompts]


def paste_edit(given: EditInput, edited: Edited, paste: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """The photograph with the edit in it, and where it may differ (None: anywhere in the square)."""
    whole = paste_crop(given.image, edited.pictures[1], given.crop)
    if edited.masks is None:
        return whole, None
    side = given.crop.side
    region = np.zeros(given.image.shape[:2], bool)
    x0, y0 = given.crop.x0, given.crop.y0
    mask = (edited.masks[0] | edited.masks[1]).astype(np.float32)
    region[y0 : y0 + side, x0 : x0 + side] = resize(mask, side, side) > 0.5
    return paste_back(whole, given.image, region) if paste else whole, region


def attention_sheet(edited: Edited, side: int) -> np.ndarray:
    """A picture of where each word looks: the source's words above, the target's below, on the pictures themselves."""
    rows, titles = [], []
    for picture, maps in zip(edited.pictures, edited.maps, strict=True):
        lit = (resize(heat, side, side).clip(0.1, 1)[..., None] for _, heat in maps)
        shown = [np.rint(picture * light).astype(np.uint8) for light in lit]
        rows.append([picture, *shown])
        titles.append(["", *(word for word, _ in maps)])
    blocks = [grid([row], names) for row, names in zip(rows, titles, strict=True)]
    width = max(block.shape[1] for block in blocks)
    return np.concatenate([np.pad(b, ((0, 0), (0, width - b.shape[1]), (0, 0)), constant_values=255) for b in blocks])
