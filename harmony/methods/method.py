"""Composites and the one interface of all methods that fill their holes.

``harmonize``, the tables of a study, the grid of a training and every other surface take any method. A new method is a
file in this folder and an option file in ``configs/method``.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harmony.data.descriptions import Description
from harmony.pixels.composites import copy_paste
from harmony.pixels.images import Crop
from harmony.pixels.masks import TEST_RADIUS

Seed = tuple[int, int]  # (seed, index): the noise of a sample depends on these alone
CAPTION, EXEMPLAR, LIGHTS = "caption", "exemplar", "lights"  # what a method may need beside the pictures


@dataclass(frozen=True)
class Composite:
    """One object to insert into one picture, at a method's resolution R.

    ``background``, ``instance`` uint8 R x R x 3; ``mask``, ``hole`` bool R x R, the hole containing the mask.
    ``caption``: what the finished picture shows. ``exemplar``: a picture of the object to paint, uint8 of any size.
    ``lights``: descriptions of the object's light and of the light around it, one or several to choose from. ``name``,
    and ``crop`` of a photograph of ``size`` (width, height): where the square comes from. ``naive_composite``: copy and
    paste, where it was done before the square was cut out. ``is_photograph``: False for a render.
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
    naive_composite: np.ndarray | None = None
    is_photograph: bool = True

    def copy_paste(self) -> np.ndarray:
        """The composite by copy and paste, uint8 R x R x 3."""
        if self.naive_composite is not None:
            return self.naive_composite
        return copy_paste(self.background, self.instance, self.mask)

    def mirror(self) -> "Composite":
        """The same square from left to right, without the place that it comes from."""
        names = ("background", "instance", "mask", "hole", "naive_composite")
        arrays = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        mirrored = {name: np.ascontiguousarray(array[:, ::-1]) for name, array in arrays.items()}
        return replace(self, crop=None, size=None, **mirrored)

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that an output may depend on."""
        arrays = (self.background, self.instance, self.mask, self.hole, self.exemplar, self.naive_composite)
        pixels = [None if a is None else (a.shape, hashlib.sha256(np.ascontiguousarray(a)).hexdigest()) for a in arrays]
        return fingerprint(pixels, self.caption, self.lights, self.name, self.crop)


class Method:
    """The interface of everything that fills holes; R is its ``resolution``.

    ``wants``: what it needs of a composite beside the pictures (caption, exemplar, lights). ``radius``: how far a hole
    extends beyond its object, px at 512. ``say``: called with lines about the progress within a composite.
    ``resolution`` None: it works at the size of each photograph. ``relights``: it changes the light of an object that
    stays as it is, and can ``relight``; the others paint it anew.
    """

    resolution: int | None
    device: torch.device = torch.device("cpu")
    wants: frozenset[str] = frozenset()
    radius: float = TEST_RADIUS
    relights: bool = False
    say: Callable[[str], None] = staticmethod(lambda line: None)

    @property
    def fingerprint(self) -> str:
        """Hash of weights and settings; an output depends on this, the composite and the seed alone."""
        raise NotImplementedError

    def fill(self, composites: Sequence[Composite], seeds: Sequence[Seed]) -> list[np.ndarray]:
        """Fill the holes: squares uint8 R x R x 3 before paste-back; noise of item i depends on ``seeds[i]`` alone."""
        raise NotImplementedError

    def relight(self, composites: Sequence[Composite], seeds: Sequence[Seed]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each composite before and after its change of light, uint8 R x R x 3, for methods with ``relights``.

        Both have the errors of the same networks; what they differ in is the change, which a photograph takes at its
        full size.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """One line that says what runs."""
        raise NotImplementedError

    def views(self, composites: Sequence[Composite]) -> dict[str, list[np.ndarray]]:
        """Title -> a picture for each composite of what the networks see beside the background."""
        return {}

    def write_beside(self, index: int, composite: Composite, folder: Path) -> dict[str, Path]:
        """Write further results of the last ``fill`` for its composite number ``index``; name -> file."""
        return {}

    def networks(self) -> dict[str, list[torch.nn.Module]]:
        """Name -> the networks whose time is reported under it; they are loaded if need be."""
        return {}


def fingerprint(*facts: Any) -> str:
    """sha256 of facts that JSON can hold; dataclasses count by their fields, anything else by its text."""

    def simplify(value: Any) -> Any:
        return asdict(value) if is_dataclass(value) else str(value)

    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=simplify).encode()).hexdigest()


def make_seeds(seed: int, indices: Sequence[int]) -> list[Seed]:
    """The seeds of the samples with numbers ``indices`` of a run."""
    return [(seed, index) for index in indices]
