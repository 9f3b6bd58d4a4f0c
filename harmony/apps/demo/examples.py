"""Examples of the demo, made of the pictures that come with the package."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from harmony.core.files import bundled
from harmony.methods.inputs import get_size, read_inputs
from harmony.models.shipped import ASSETS
from harmony.pixels.composites import copy_paste
from harmony.pixels.images import read_image, write_image
from harmony.pixels.masks import read_mask

RENDERS = ("00eb321872a14a42", "232eb55abe32b815")  # a snowman lit by the sky, a mug lit by the evening sun


@dataclass(frozen=True)
class Example:
    """A photograph with a cut-out to place on it; ``thumbnail``: a picture of both."""

    photograph: str
    cut_out: str
    thumbnail: str


def list_examples(folder: Path) -> list[Example]:
    """The examples; what has to be put together first is written into ``folder``."""
    pairs = {"astronaut": (str(ASSETS / "example" / "rocket.jpg"), str(ASSETS / "example" / "astronaut.webp"))}
    split = bundled("datasets") / "studio" / "test"
    for name in RENDERS if split.is_dir() else ():
        mask = next(split.glob(f"labels/masks/*/{name}_*.png"))
        cut_out = cut_out_object(split / "relit" / f"{name}.jpg", mask, folder / f"{name}_object.png")
        pairs[name] = (str(split / "plates" / f"{name}.jpg"), cut_out)
    return [Example(*pair, paste(*pair, folder / f"{name}.png")) for name, pair in pairs.items()]


def cut_out_object(picture: Path, mask: Path, target: Path) -> str:
    """Write the object of a picture with a transparent background."""
    pixels = read_image(picture)
    alpha = read_mask(mask, get_size(pixels)) * np.uint8(255)
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.dstack([pixels, alpha])).save(target)
    return str(target)


def paste(photograph: str, cut_out: str, target: Path) -> str:
    """Write a cut-out pasted on a photograph."""
    inputs = read_inputs({"background": photograph, "foreground": cut_out, "box": None})
    write_image(target, copy_paste(inputs.background, inputs.foreground, inputs.mask))
    return str(target)
