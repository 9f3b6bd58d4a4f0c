"""F6. ``python -m harmony.edit``: change one photograph by the words that describe it.

  image=I.jpg source="a cat on a sofa" target="a dog on a sofa"            another word: replace
  image=I.jpg source="a cat on a sofa" target="a black cat on a sofa"      further words: insert
  image=I.jpg source="a cat on a sofa" target="a <toy> on a sofa" words=[RUN]   a word learnt by textual inversion
  image=I.jpg source="a street" target="a street, watercolour" mode=style  the whole picture
  image=I.jpg source=S target=S reweight={snowy: 3}                        the same words, one of them stronger

What it cannot do: remove something, put something reliably where nothing is, move things. Words change what is there.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harmony.composites import paste_back
from harmony.config import entry, literal, make_folder, new_folder
from harmony.data.captions import caption_images
from harmony.errors import UserError
from harmony.files import write_json, write_text
from harmony.images import (
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
from harmony.metrics.fidelity import psnr
from harmony.models.kit import Kit
from harmony.models.textual_inversion import learn, read_word
from harmony.sampling.ddim import timesteps
from harmony.sampling.edit import MODES, Edited, Mode, edit_picture, kept_inversion, mode_of

TEXTS = ("image", "source", "target", "output", "model.path")
NUMBERS = {"guidance": float, "threshold": float, "steps": int, "inner": int}
LIMITS = "words change what is there: removing, moving, or putting something where nothing is are not to be relied on"


def overrides(words: list[str]) -> list[str]:
    """The command line for Hydra: paths and prompts are text, and lists are lists rather than sweeps."""
    for key in ("square", "words", "look_at"):
        words = [
            f"{key}=[{w.partition('=')[2]}]" if w.startswith(f"{key}=") and w[len(key) + 1] != "[" else w for w in words
        ]
    return [literal(word, TEXTS) for word in words]


@dataclass(frozen=True)
class Asked:
    """The photograph, uint8 H x W x 3, and the square of it that is worked on."""

    image: np.ndarray
    crop: Crop


def read_asked(cfg: DictConfig) -> Asked:
    """Read and check what the command line names. UserError in one line for anything that does not fit."""
    if cfg.mode is not None and cfg.mode not in MODES:
        raise UserError(f"mode={cfg.mode}: choose one of {', '.join(MODES)}")
    for name, kind in NUMBERS.items():
        if type(cfg[name]) not in (int, kind):
            raise UserError(f"{name}={cfg[name]}: give {'a whole number' if kind is int else 'a number'}")
    for name in ("cross", "own", "threshold"):
        if cfg[name] is not None and not 0 <= cfg[name] <= 1:
            raise UserError(f"{name}={cfg[name]}: give a share between 0 and 1")
    timesteps(cfg.steps)
    image = read_image(cfg.image)
    height, width = image.shape[:2]
    if cfg.square is None:
        middle = (width // 2, height // 2, width // 2 + 1, height // 2 + 1)
        return Asked(image, square_around(middle, width, height))
    crop = Crop(*cfg.square) if len(cfg.square) == 3 else None
    if (
        crop is None
        or min(cfg.square) < 0
        or crop.x0 + crop.side > width
        or crop.y0 + crop.side > height
        or not crop.side
    ):
        raise UserError(
            f"square={list(cfg.square)}: give x0,y0,side of a square inside the {width} x {height} photograph"
        )
    return Asked(image, crop)


def caption(kit: Kit, path: str) -> str:
    """What the kit's captioner says of the photograph. UserError for a kit without one."""
    return next(caption_images([("image", Path(path))], kit.captioner, kit.processor, 1, kit.device))[1]


def settings(cfg: DictConfig) -> tuple[str, Mode]:
    """The name of the mode and its numbers, those of the command line before its own."""
    meant = mode_of(cfg.source, cfg.target)
    name = cfg.mode or meant
    given = {key: cfg[key] for key in ("cross", "own", "local") if cfg[key] is not None}
    if meant == "reweight" and not cfg.reweight:
        raise UserError("source= and target= are the same words: change one, or give reweight={word: factor}")
    if name == "replace" and meant != "replace":
        raise UserError(
            f"mode=replace wants as many words: the source has {len(cfg.source.split())}, the target "
            f"{len(cfg.target.split())}; leave mode= out and the edit is an insert"
        )
    return name, replace(MODES[name], **given)


def chosen(cfg: DictConfig) -> list[list[int]] | None:
    """The numbers of the words ``look_at`` in each prompt. UserError for one that neither has."""
    if cfg.look_at is None:
        return None
    prompts = [prompt.split() for prompt in (cfg.source, cfg.target)]
    if unknown := [word for word in cfg.look_at if not any(word in words for words in prompts)]:
        raise UserError(f"look_at={unknown[0]}: neither the source nor the target has this word")
    return [[n for n, word in enumerate(words) if word in cfg.look_at] for words in prompts]


def finish(asked: Asked, edited: Edited, paste: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """The photograph with the edit in it, and where it may differ (None: anywhere in the square)."""
    whole = paste_crop(asked.image, edited.pictures[1], asked.crop)
    if edited.masks is None or not paste:
        return whole, None
    side = asked.crop.side
    region = np.zeros(asked.image.shape[:2], bool)
    x0, y0 = asked.crop.x0, asked.crop.y0
    mask = (edited.masks[0] | edited.masks[1]).astype(np.float32)
    region[y0 : y0 + side, x0 : x0 + side] = resize(mask, side, side) > 0.5
    return paste_back(whole, asked.image, region), region


def words_seen(edited: Edited, side: int) -> np.ndarray:
    """A picture of where each word looks: the source's words above, the target's below, on the pictures themselves."""
    rows, titles = [], []
    for picture, maps in zip(edited.pictures, edited.maps, strict=True):
        shown = [
            np.rint(picture * resize(heat, side, side).clip(0.1, 1)[..., None]).astype(np.uint8)
            for heat in maps.values()
        ]
        rows.append([picture, *shown])
        titles.append(["", *maps])
    blocks = [grid([row], names) for row, names in zip(rows, titles, strict=True)]
    width = max(block.shape[1] for block in blocks)
    return np.concatenate([np.pad(b, ((0, 0), (0, width - b.shape[1]), (0, 0)), constant_values=255) for b in blocks])


@entry("edit", read=overrides)
def main(cfg: DictConfig) -> None:
    """Invert the photograph (once), edit it, and write source, reconstruction, edit, masks and attention maps."""
    asked = read_asked(cfg)
    kit = instantiate(cfg.model).to("cuda" if torch.cuda.is_available() else "cpu")
    for path in cfg.words:
        word = read_word(path)
        learn(kit, word)
        print(f"{word.token} is a word of {len(word.vectors)} vector{'s' * (len(word.vectors) > 1)}, from {path}")
    if cfg.source is None:
        cfg.source = caption(kit, cfg.image)
        print(f"source {cfg.source!r}, by the captioner; its words are the handles: correct them with source=")
    name, mode = settings(cfg)
    look_at = chosen(cfg)
    local = "local" if mode.local else "in the whole picture"
    print(f"{name}, {local}: {cfg.source!r} -> {cfg.target!r}; cross {mode.cross:g}, own {mode.own:g}; {LIMITS}")
    square = crop_resize(asked.image, asked.crop, kit.resolution)
    options = cfg.source, cfg.steps, cfg.guidance, cfg.inner
    inversion = kept_inversion(
        Path(cfg.paths.work) / "inversions", kit, square, *options, lambda s: print(s, flush=True)
    )
    factors = dict(cfg.reweight) or None
    edited = edit_picture(kit, inversion, cfg.source, cfg.target, cfg.guidance, mode, factors, look_at, cfg.threshold)
    bound = from_model(kit.decode(inversion.latent))[0]
    figures = {"autoencoder/psnr": psnr(bound, square), "reconstruction/psnr": psnr(edited.pictures[0], square)}
    how = "fast mode, no null texts" if cfg.inner == 0 else "null texts"
    print(
        f"reconstruction ({how}) {figures['reconstruction/psnr']:.2f} dB, the autoencoder's bound is "
        f"{figures['autoencoder/psnr']:.2f} dB"
    )
    image, region = finish(asked, edited, cfg.paste)
    folder = make_folder(cfg.output) if cfg.output else new_folder(Path(cfg.paths.runs).resolve() / "edit")
    pictures = {"edit": image, "source": square, "reconstruction": edited.pictures[0], "raw": edited.pictures[1]}
    shown = [square, edited.pictures[0], edited.pictures[1], crop_resize(image, asked.crop, kit.resolution)]
    titles = ["source", "reconstruction", "raw edit", "edit"]
    if region is not None:
        pictures["mask"] = region
        for who, mask in zip(("source", "target"), edited.masks, strict=True):
            pictures[f"mask_{who}"] = mask
    pictures |= {"attention": words_seen(edited, kit.resolution), "sheet": grid([shown], titles)}
    for file, picture in pictures.items():
        write_image(folder / f"{file}.png", picture)
    write_json(folder / "metrics.json", {key: float(value) for key, value in figures.items()})
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    print(*(folder / f"{file}.png" for file in pictures), sep="\n")


if __name__ == "__main__":
    main()
