"""What the judge of composites learns from: photographs, and the same with their object under another light."""

import time
from pathlib import Path

import cv2
import numpy as np
import torch

from harmony.core.errors import UserError
from harmony.data.latent_cache import Recipe, example
from harmony.data.manifest import read_manifest
from harmony.pixels.composites import copy_paste, other_light
from harmony.pixels.images import to_model
from harmony.pixels.masks import scaled

VISIBLE = 8.0  # grey levels by which an object under another light differs at least, mean over its pixels
SOFT = 10.0  # px at 512: the widest blur of an object
DRAWS = 8  # lights that are tried until one is visible


def under_other_light(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``image`` under a light whose difference is visible in ``mask``: the first of some draws, or the last."""
    for _ in range(DRAWS):
        lit = other_light(image, rng)
        if np.abs(lit[mask].astype(np.float32) - image[mask]).mean() >= VISIBLE:
            break
    return lit


class Composites(torch.utils.data.Dataset):
    """Photographs with their object under another light (label 0), and as they were taken (label 1).

    Squares of ``side`` R of a manifest's split, held in memory. An item is such a pair, alike in all but the light:
    ``image`` 2 x 3 x R x R in [-1, 1], ``mask`` 2 x 1 x R x R and ``label`` 2, drawn from (seed, position) alone. The
    other light is the render under its second light where the dataset has one, in half of the draws, else a random
    change of exposure, white balance and contrast. ``photos``: the share that pictures without a second light have, by
    repetition (None: each once).
    """

    def __init__(self, manifest: Path, split: str, side: int, crop: str, seed: int, photos: float | None = None):
        self.seed, rows = seed, read_manifest(manifest, split)[1]
        recipe, root, said = Recipe(crop=crop, mismatch=1.0, seed=seed), Path(manifest).parent, time.monotonic()
        self.examples, self.render = [], []
        for done, row in enumerate(rows, 1):
            made = example(row, root, recipe, side)
            self.examples.append((made.image, made.mask, made.instance))
            self.render.append("relit" in row.extras)
            if time.monotonic() - said > 10:
                print(f"{split}: {done}/{len(rows)} pictures read", flush=True)
                said = time.monotonic()
        self.order = self.repeated(photos)

    def repeated(self, photos: float | None) -> list[int]:
        """The indices of all examples, those of photographs as often as their share wants."""
        if photos is not None and not 0 <= photos < 1:
            raise UserError(f"data.photos={photos}: give a share from 0 to below 1")
        taken = [i for i, render in enumerate(self.render) if not render]
        times, rendered = 1, len(self.render) - len(taken)
        if photos and taken and rendered:
            times = max(1, round(photos / (1 - photos) * rendered / len(taken)))
        return [*range(len(self.render)), *taken * (times - 1)]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        position, i = key[0], self.order[key[1]]
        image, mask, relit = self.examples[i]
        rng = np.random.default_rng([self.seed, position])
        if rng.random() < 0.5:
            image, mask, relit = (np.ascontiguousarray(a[:, ::-1]) for a in (image, mask, relit))
        lit = relit if self.render[i] and rng.random() < 0.5 else under_other_light(image, mask, rng)
        pair = np.stack([copy_paste(image, lit, mask), image])
        if rng.random() < 0.25:  # the whole picture: no exposure is wrong in itself
            pair = other_light(pair, rng)
        if rng.random() < 0.5:  # how sharp an object is says nothing of its light
            sigma = max(0.1, scaled(rng.uniform(0, SOFT), mask.shape))
            pair = np.stack([copy_paste(x, cv2.GaussianBlur(x, (0, 0), sigma), mask) for x in pair])
        masks = torch.from_numpy(mask).float().expand(2, 1, -1, -1)
        return {"image": torch.stack([to_model(x) for x in pair]), "mask": masks, "label": torch.tensor([0, 1])}
