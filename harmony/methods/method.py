"""The one abstraction: a method fills the holes of composites, whatever it is made of.

``harmonize``, the tables of a study, the grid of a training and every other surface take any method. A new one is a
file in this folder and an option file in ``configs/method``.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harmony.data.descriptions import Description
from harmony.pixels.composites import copy_paste
from harmony.pixels.images import Crop
from harmony.pixels.masks import TEST_RADIUS

Seed = tuple[int, int]  # (seed, index): all that the noise of a sample depends on
CAPTION, EXEMPLAR, LIGHTS = "caption", "exemplar", "lights"  # what a method may want beside the pictures


@dataclass(frozen=True)
class Composite:
    """One object to go into one picture, at a method's resolution R.

    ``background``, ``instance`` uint8 R x R x 3; ``mask``, ``hole`` bool R x R, the hole containing the mask.
    ``caption``: what the finished picture shows. ``exemplar``: uint8 of any size, a picture of what is to appear.
    ``lights``: words for the object's light and for that around it, one description or several to choose from.
    ``name``, and ``crop`` of a photograph of ``size`` (width, height): where the square comes from. ``naive``: the
    composite by copy and paste, where it was made before the square was cut out.
    """

    background: np.ndarray
    instance: np.ndarray
    mask: np.ndarray
    hole: np.ndarray
    caption: str = ""
    exemplar: np.ndarray | None = None
    lights: tuple[Description, ...] = ()
    name: str = ""
    crop: Crop | None = None
    size: tuple[int, int] | None = None
    naive: np.ndarray | None = None

    def copy_paste(self) -> np.ndarray:
        """The naive composite, uint8 R x R x 3."""
        return copy_paste(self.background, self.instance, self.mask) if self.naive is None else self.naive

    @property
    def fingerprint(self) -> str:
        """sha256 of all that an output may depend on."""
        arrays = (self.background, self.instance, self.mask, self.hole, self.exemplar, self.naive)
        pixels = [None if a is None else (a.shape, hashlib.sha256(np.ascontiguousarray(a)).hexdigest()) for a in arrays]
        return fingerprint(pixels, self.caption, self.lights, self.name, self.crop)


class Method:
    """What everything that fills holes offers; R is its ``resolution``.

    ``wants``: what of a composite it needs beside the pictures (caption, exemplar, lights). ``radius``: by how much a
    hole is larger than its object, px at 512. ``carries_detail``: what it changed of the composite is done to the
    photograph at full size, instead of enlarging what it made.
    """

    resolution: int
    device: torch.device = torch.device("cpu")
    wants: frozenset[str] = frozenset()
    radius: float = TEST_RADIUS
    carries_detail: bool = False
    say: Callable[[str], None] = staticmethod(lambda line: None)  # told what happens within a composite

    @property
    def fingerprint(self) -> str:
        """Hash of weights and settings: with the composite and the seed, all that an output depends on."""
        raise NotImplementedError

    def fill(self, composites: Sequence[Composite], seeds: Sequence[Seed]) -> list[np.ndarray]:
        """The filled squares, uint8 R x R x 3, before any paste-back; noise of item i depends on ``seeds[i]`` alone."""
        raise NotImplementedError

    def describe(self) -> str:
        """What runs, in one line."""
        raise NotImplementedError

    def views(self, composites: Sequence[Composite]) -> dict[str, list[np.ndarray]]:
        """Title -> what the networks see of each composite beside the background."""
        return {}

    def write_beside(self, index: int, composite: Composite, folder: Path) -> dict[str, Path]:
        """Write what the last ``fill`` left of its composite number ``index`` beside the picture; name -> file."""
        return {}

    def networks(self) -> dict[str, list[torch.nn.Module]]:
        """The networks that run, loaded, by the names under which their time is told."""
        return {}


def fingerprint(*facts: Any) -> str:
    """sha256 of facts that JSON can hold, dataclasses among them."""

    def plain(value: Any) -> Any:
        return asdict(value) if is_dataclass(value) else str(value)

    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=plain).encode()).hexdigest()


def seeds_of(seed: int, indices: Sequence[int]) -> list[Seed]:
    """The seeds of samples number ``indices`` of a run."""
    return [(seed, index) for index in indices]
