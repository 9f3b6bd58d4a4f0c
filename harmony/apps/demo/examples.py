"""Examples of the demo, made of the pictures that come with the package."""

import shutil
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
    """The examples, all of their files in ``folder``: Gradio serves none of the package's own."""
    folder.mkdir(parents=True)
    pictures = [ASSETS / "example" / name for name in ("rocket.jpg", "astronaut.webp")]
    pairs = {"astronaut": [shutil.copy(picture, folder) for picture in pictures]}
    split = bundled("datasets") / "studio" / "test"
    for name in RENDERS if split.is_dir() else ():
        mask = next(split.glob(f"labels/masks/*/{name}_*.png"))
        cut_out = cut_out_object(split / "relit" / f"{name}.jpg", mask, folder / f"{name}_object.png")
        pairs[name] = [shutil.copy(split / "plates" / f"{name}.jpg", folder), cut_out]
    return [Example(*map(str, pair), paste(*pair, folder / f"{name}.png")) for name, pair in pairs.items()]


def cut_out_object(picture: Path, mask: Path, target: Path) -> Path:
    """Write the object of a picture with a transparent background."""
    pixels = read_image(picture)
    alpha = read_mask(mask, get_size(pixels)) * np.uint8(255)
    Image.fromarray(np.dstack([pixels, alpha])).save(target)
    return target


def paste(photograph: Path, cut_out: Path, target: Path) -> str:
    """Write a cut-out pasted on a photograph."""
    inputs = read_inputs({"background": str(photograph), "foreground": str(cut_out), "box": None})
    write_image(target, copy_paste(inputs.background, inputs.foreground, inputs.mask))
    return str(target)
