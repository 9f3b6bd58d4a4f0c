"""Results of any other program, read by name, so that they appear in the same tables as our methods."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harmony.core.errors import UserError
from harmony.methods.method import Composite, Method, Seed, fingerprint
from harmony.models.backbone import Backbone
from harmony.models.shipped import check_places
from harmony.pixels.images import SUFFIXES, crop_resize, read_image, resize, sha256


class Stored(Method):
    """A folder with a picture for each composite, NAME.png (or .jpg, ...): the whole photograph, scaled or not.

    Of a photograph that is no square it may be the square that our methods fill.
    """

    resolution = None

    def __init__(self, backbone: Backbone, folder: str):
        check_places({"folder": folder})
        self.folder = Path(folder)

    @functools.cached_property
    def files(self) -> dict[str, list[Path]]:
        """Name -> the picture files of this name, one if all is well."""
        files: dict[str, list[Path]] = {}
        for path in sorted(self.folder.iterdir()):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                files.setdefault(path.stem, []).append(path)
        return files

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint("stored", {name: list(map(sha256, paths)) for name, paths in self.files.items()})

    def describe(self) -> str:
        return f"{len(self.files)} results from {self.folder}"

    def fill(self, composites: Sequence[Composite], seeds: Sequence[Seed]) -> list[np.ndarray]:
        return [self.read(c) for c in composites]

    def read(self, composite: Composite) -> np.ndarray:
        """The result for a composite, uint8 R x R x 3. UserError where it is missing, not alone, or of a wrong size."""
        paths = self.files.get(composite.name, [])
        if not paths:
            raise UserError(f"{self.folder} has no result for {composite.name}: put {composite.name}.png there")
        if len(paths) > 1:
            raise UserError(f"{self.folder} has {' and '.join(p.name for p in paths)}: keep one of them")
        path = paths[0]
        picture, side = read_image(path), len(composite.mask)
        height, width = picture.shape[:2]
        if composite.crop is not None and is_scaled((width, height), composite.size):
            return crop_resize(resize(picture, *composite.size), composite.crop, side)
        if width == height:
            return resize(picture, side, side)
        expected_size = "x".join(map(str, composite.size)) if composite.size else "its photograph"
        raise UserError(f"{path} is {width} x {height}: give the whole photograph ({expected_size}) or its square")


def is_scaled(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether a picture of ``size`` may be one of ``other`` size, smaller or larger; only squares become squares."""
    scale = max(size) / max(other)
    is_alike = all(abs(a - scale * b) <= 0.5 for a, b in zip(size, other, strict=True))
    return is_alike and (size[0] == size[1]) == (other[0] == other[1])
