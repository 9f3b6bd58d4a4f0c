"""``python -m harmony.edit``: change one photograph by the words that describe it.

  image=I.jpg source="a cat on a sofa" target="a dog on a sofa"            another word: replace
  image=I.jpg source="a cat on a sofa" target="a black cat on a sofa"      further words: insert
  image=I.jpg source="a cat on a sofa" target="a <toy> on a sofa" words=RUN   a word learnt by textual inversion
  image=I.jpg source="a street" target="a street, watercolour" mode=style  the whole picture
  image=I.jpg source=S target=S reweight="{snowy: 3}"                      the same words, one of them stronger

What it cannot do: remove something, put something reliably where nothing is, move things. Words change what is there.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harmony.cli.command import entry, literal
from harmony.cli.run_folder import make_folder, new_folder
from harmony.core.errors import UserError
from harmony.core.files import write_json, write_text
from harmony.data.captions import caption_picture
from harmony.methods.prompt_editing import MODES, Edited, Mode, edit_picture, kept_inversion, mode_of, plan
from harmony.metrics.fidelity import psnr
from harmony.models.textual_inversion import learn, read_word
from harmony.pixels.composites import paste_back
from harmony.pixels.images import (
    Crop,
    crop_resize,
    from_model,
    grid,
    paste_crop,
    read_image,
    resize,
    square_around,
    write_image,
)
from harmony.sampling.ddim import timesteps
from harmony.sampling.prompt_to_prompt import bare

TEXTS = ("image", "source", "target", "output", "model.path", "words", "look_at", "square", "reweight")
NUMBERS = {"guidance": float, "threshold": float, "cross": float, "own": float, "steps": int, "inner": int}
SWITCHES = ("local", "paste")
LIMITS = "words change what is there: removing, moving, or putting something where nothing is are not to be relied on"


def overrides(words: list[str]) -> list[str]:
    """The command line for Hydra, whose grammar knows neither prompts nor angle brackets: what is text stays text."""
    return [literal(word, TEXTS) for word in words]


def listed(value) -> list[str] | None:
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
    for item in listed(value.strip().removeprefix("{").removesuffix("}")):
        word, _, factor = item.rpartition(":")
        try:
            factors[word.strip(" '\"")] = float(factor)
        except ValueError:
            raise UserError(f"reweight={value}: give a word and a factor, reweight={{snowy: 3}}") from None
    return factors


@dataclass(frozen=True)
class Asked:
    """The photograph, uint8 H x W x 3, and the square of it that is worked on."""

    image: np.ndarray
    crop: Crop


def read_asked(cfg: DictConfig) -> Asked:
    """Read and check what the command line names. UserError in one line for anything that does not fit."""
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
        return Asked(image, square_around(middle, width, height))
    try:
        x0, y0, side = map(int, listed(cfg.square))
        fits = min(x0, y0) >= 0 < side and x0 + side <= width and y0 + side <= height
    except ValueError:
        fits = False
    if not fits:
        raise UserError(f"square={cfg.square}: give x0,y0,side of a square inside the {width} x {height} photograph")
    return Asked(image, Crop(x0, y0, side))


def settings(cfg: DictConfig, factors: dict[str, float]) -> tuple[str, Mode]:
    """The name of the mode and its numbers, those of the command line before its own."""
    meant = mode_of(cfg.source, cfg.target)
    name = cfg.mode or meant
    given = {key: cfg[key] for key in ("cross", "own", "local") if cfg[key] is not None}
    if meant == "reweight" and not factors:
        raise UserError("source= and target= are the same words: change one, or give reweight={word: factor}")
    if name == "replace" and meant == "insert":
        raise UserError(
            f"mode=replace wants as many words: the source has {len(cfg.source.split())}, the target "
            f"{len(cfg.target.split())}; leave mode= out and the edit is an insert"
        )
    return name, replace(MODES[name], **given)


def chosen(cfg: DictConfig) -> list[list[int]] | None:
    """The numbers of the words ``look_at`` in each prompt. UserError for one that neither has."""
    if (wanted := listed(cfg.look_at)) is None:
        return None
    prompts = [[bare(word) for word in prompt.split()] for prompt in (cfg.source, cfg.target)]
    if unknown := [word for word in wanted if not any(bare(word) in words for words in prompts)]:
        raise UserError(f"look_at={unknown[0]}: neither the source nor the target has this word")
    return [[n for n, word in enumerate(words) if word in map(bare, wanted)] for words in prompts]


def finish(asked: Asked, edited: Edited, paste: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """The photograph with the edit in it, and where it may differ (None: anywhere in the square)."""
    whole = paste_crop(asked.image, edited.pictures[1], asked.crop)
    if edited.masks is None:
        return whole, None
    side = asked.crop.side
    region = np.zeros(asked.image.shape[:2], bool)
    x0, y0 = asked.crop.x0, asked.crop.y0
    mask = (edited.masks[0] | edited.masks[1]).astype(np.float32)
    region[y0 : y0 + side, x0 : x0 + side] = resize(mask, side, side) > 0.5
    return paste_back(whole, asked.image, region) if paste else whole, region


def words_seen(edited: Edited, side: int) -> np.ndarray:
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


@entry("edit", read=overrides)
def main(cfg: DictConfig) -> None:
    """Invert the photograph (once), edit it, and write source, reconstruction, edit, masks and attention maps."""
    asked = read_asked(cfg)
    backbone = instantiate(cfg.model).to("cuda" if torch.cuda.is_available() else "cpu")
    for path in listed(cfg.words) or ():
        word = read_word(path)
        learn(backbone, word)
        print(f"{word.token} is a word of {len(word.vectors)} vector{'s' * (len(word.vectors) > 1)}, from {path}")
    square = crop_resize(asked.image, asked.crop, backbone.resolution)
    if cfg.source is None:
        seen = crop_resize(asked.image, asked.crop, asked.crop.side)
        cfg.source = caption_picture(seen, backbone.captioner, backbone.processor, backbone.device)
        print(f"source {cfg.source!r}, by the captioner; its words are the handles: correct them with source=")
    factors = read_factors(cfg.reweight)
    name, mode = settings(cfg, factors)
    words = factors or None, chosen(cfg)
    planned = plan(backbone, cfg.source, cfg.target, mode, *words)  # what does not fit is refused before the inversion
    local = "local" if mode.local else "in the whole picture"
    print(f"{name}, {local}: {cfg.source!r} -> {cfg.target!r}; cross {mode.cross:g}, own {mode.own:g}; {LIMITS}")
    kept, options = Path(cfg.paths.work) / "inversions", (cfg.source, cfg.steps, cfg.guidance, cfg.inner)
    inversion = kept_inversion(kept, backbone, square, *options, lambda line: print(line, flush=True))
    edited = edit_picture(backbone, inversion, planned, cfg.guidance, cfg.threshold)
    bound = from_model(backbone.decode(inversion.latent))[0]
    figures = {"autoencoder/psnr": psnr(bound, square), "reconstruction/psnr": psnr(edited.pictures[0], square)}
    how = "fast mode, no null texts" if cfg.inner == 0 else "null texts"
    print(
        f"reconstruction ({how}) {figures['reconstruction/psnr']:.2f} dB, the autoencoder's bound is "
        f"{figures['autoencoder/psnr']:.2f} dB"
    )
    image, region = finish(asked, edited, cfg.paste)
    folder = make_folder(cfg.output) if cfg.output else new_folder(Path(cfg.paths.runs).resolve() / "edit")
    pictures = {"edit": image, "source": square, "reconstruction": edited.pictures[0], "raw": edited.pictures[1]}
    shown = [square, edited.pictures[0], edited.pictures[1], crop_resize(image, asked.crop, backbone.resolution)]
    titles = ["source", "reconstruction", "raw edit", "edit"]
    if region is not None:
        pictures["mask"] = region
        for who, mask in zip(("source", "target"), edited.masks, strict=True):
            pictures[f"mask_{who}"] = mask
    pictures |= {"attention": words_seen(edited, backbone.resolution), "sheet": grid([shown], titles)}
    for file, picture in pictures.items():
        write_image(folder / f"{file}.png", picture)
    write_json(folder / "metrics.json", {key: float(value) for key, value in figures.items()})
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    print(*(folder / f"{file}.png" for file in pictures), sep="\n")


if __name__ == "__main__":
    main()
