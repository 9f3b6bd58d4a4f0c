"""Examples of the demo, made of the pictures that come with the package."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harmony.core.files import bundled
from harmony.methods.inputs import read_inputs
from harmony.models.shipped import ASSETS
from harmony.pixels.composites import copy_paste
from harmony.pixels.images import read_image, write_image
from harmony.pixels.masks import read_mask

RENDERS = ("00eb321872a14a42", "232eb55abe32b815")  # a snowman lit by the sky, a mug lit by the evening sun


@dataclass(frozen=True)
class Example:
    """A photograph with a cut-out to place on it, or, without one, with the mask of an object that is in it.

    ``thumbnail``: the picture that stands for it.
    """

    thumbnail: str
    photograph: str
    cut_out: str | None = None
    mask: np.ndarray | None = None


def list_examples(folder: Path) -> list[Example]:
    """The examples; those that have to be put together first are written into ``folder``."""
    photograph, cut_out = (str(ASSETS / "example" / name) for name in ("rocket.jpg", "astronaut.webp"))
    view = read_inputs({"background": photograph, "foreground": cut_out, "box": None})
    write_image(folder / "astronaut.png", copy_paste(view.background, view.foreground, view.mask))
    examples = [Example(str(folder / "astronaut.png"), photograph, cut_out)]
    split = bundled("datasets") / "studio" / "test"
    for name in RENDERS if split.is_dir() else ():
        plate, relit = (read_image(split / kind / f"{name}.jpg") for kind in ("plates", "relit"))
        mask = read_mask(next(split.glob(f"labels/masks/*/{name}_*.png")), (plate.shape[1], plate.shape[0]))
        write_image(folder / f"{name}.png", copy_paste(plate, relit, mask))
        picture = str(folder / f"{name}.png")
        examples.append(Example(picture, picture, mask=mask))
    return examples
