"""Results of any other program, read by name, so that they appear in the same tables as our methods."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harmony.core.errors import UserError
from harmony.methods.method import Composite, Method, Seed, fingerprint
from harmony.models.backbone import Backbone
from harmony.pixels.images import crop_resize, read_image, resize, sha256

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Stored(Method):
    """A folder with a picture for each composite, NAME.png (or .jpg, .webp): the whole photograph or its square."""

    resolution = None

    def __init__(self, backbone: Backbone, folder: str):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder}: there is no such folder of results; give one that exists")

    @functools.cached_property
    def files(self) -> dict[str, Path]:
        """Name -> file. UserError for two files of one name."""
        files: dict[str, Path] = {}
        for path in sorted(path for path in self.folder.iterdir() if path.suffix.lower() in SUFFIXES):
            if path.stem in files:
                raise UserError(f"{self.folder} has both {files[path.stem].name} and {path.name}: keep one of them")
            files[path.stem] = path
        return files

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint("stored", {name: sha256(path) for name, path in self.files.items()})

    def describe(self) -> str:
        return f"{len(self.files)} results from {self.folder}"

    def fill(self, composites: Sequence[Composite], seeds: Sequence[Seed]) -> list[np.ndarray]:
        return [self.read(c) for c in composites]

    def read(self, composite: Composite) -> np.ndarray:
        """The result for a composite, uint8 R x R x 3. UserError where it is missing or has the wrong size."""
        if composite.name not in self.files:
            raise UserError(f"{self.folder} has no result for {composite.name}: put {composite.name}.png there")
        path = self.files[composite.name]
        picture, side = read_image(path), len(composite.mask)
        height, width = picture.shape[:2]
        if composite.crop is not None and (width, height) == composite.size:
            return crop_resize(picture, composite.crop, side)
        if width == height:
            return resize(picture, side, side)
        expected_size = "x".join(map(str, composite.size)) if composite.size else "its photograph"
        raise UserError(f"{path} is {width} x {height}: give the whole photograph ({expected_size}) or its square")
