"""Composites for the judge: photographs, and the same photographs with their object under another light."""

from pathlib import Path

import cv2
import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from harmony.core.errors import UserError
from harmony.core.progress import Progress
from harmony.data.latent_cache import Recipe, example
from harmony.data.manifest import read_manifest
from harmony.data.stream import Stream
from harmony.pixels.composites import change_light, copy_paste
from harmony.pixels.images import to_model
from harmony.pixels.masks import scale_length

VISIBLE = 8.0  # least mean difference in gray levels of an object under another light
SOFT = 10.0  # px at 512: the widest blur of an object
DRAWS = 8  # lights to try until one is visible


class JudgeData(lightning.LightningDataModule):
    """Composites of a manifest for the judge, ``batch_size`` pairs at a time.

    ``photos`` is the share of photographs in a batch where the manifest has renders too. The validation loaders hold
    the validation and the test split, each picture once.
    """

    def __init__(self, manifest: str, side: int, batch_size: int, photos: float = 0.5, workers: int = 0, seed: int = 0):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.sets: dict[str, Composites] = {}

    def setup(self, stage: str | None = None) -> None:
        h = self.hparams
        for split in ("train", "validation", "test"):
            if split not in self.sets:
                crop, photos = ("jitter", h.photos) if split == "train" else ("centre", None)
                self.sets[split] = Composites(Path(h.manifest), split, h.side, crop, h.seed, photos)

    def train_dataloader(self) -> DataLoader:
        h, composites = self.hparams, self.sets["train"]
        stream = Stream.of(self.trainer, len(composites), h.batch_size, h.seed)
        return DataLoader(composites, h.batch_size, sampler=stream, num_workers=h.workers)

    def val_dataloader(self) -> list[DataLoader]:
        return [
            DataLoader(s, self.hparams.batch_size, sampler=[(i, i) for i in range(len(s))])
            for s in (self.sets["validation"], self.sets["test"])
        ]


def under_other_light(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``image`` under a light that makes a visible difference in ``mask``: the first such draw, or the last draw."""
    for _ in range(DRAWS):
        picture = change_light(image, rng)
        if np.abs(picture[mask].astype(np.float32) - image[mask]).mean() >= VISIBLE:
            break
    return picture


class Composites(torch.utils.data.Dataset):
    """Pairs of a picture with its object under another light (label 0) and the same picture as it is (label 1).

    The pictures are squares of ``side`` R of a manifest's split, held in memory. The two of a pair differ in the light
    alone: ``image`` 2 x 3 x R x R in [-1, 1], ``mask`` 2 x 1 x R x R and ``label`` 2, drawn from (seed, position). The
    other light is a random change of exposure, white balance and contrast, or, in half of the draws and where the
    dataset has it, the render under its second light. ``photos`` is the share of pictures without a second light,
    reached by repetition (None: each once).
    """

    def __init__(self, manifest: Path, split: str, side: int, crop: str, seed: int, photos: float | None = None):
        self.seed, rows = seed, read_manifest(manifest, split)[1]
        recipe, root = Recipe(crop=crop, mismatch=1.0, seed=seed), Path(manifest).parent
        progress = Progress(f"reading {split}", len(rows), "pictures")
        self.examples, self.render = [], []
        for row in rows:
            square = example(row, root, recipe, side)
            self.examples.append((square.image, square.mask, square.instance))
            self.render.append("relit" in row.extras)
            progress.advance(1, every=1000)
        self.order = self.repeat(photos)

    def repeat(self, photos: float | None) -> list[int]:
        """The indices of all examples, those of photographs as often as their share demands."""
        if photos is not None and not 0 <= photos < 1:
            raise UserError(f"data.photos={photos}: give a share from 0 to below 1")
        photographs = [i for i, render in enumerate(self.render) if not render]
        times, renders = 1, len(self.render) - len(photographs)
        if photos and photographs and renders:
            times = max(1, round(photos / (1 - photos) * renders / len(photographs)))
        return [*range(len(self.render)), *photographs * (times - 1)]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        position, i = key[0], self.order[key[1]]
        image, mask, relit = self.examples[i]
        rng = np.random.default_rng([self.seed, position])
        if rng.random() < 0.5:
            image, mask, relit = (np.ascontiguousarray(a[:, ::-1]) for a in (image, mask, relit))
        other = relit if self.render[i] and rng.random() < 0.5 else under_other_light(image, mask, rng)
        pair = np.stack([copy_paste(image, other, mask), image])
        if rng.random() < 0.25:  # the whole picture: no exposure is wrong in itself
            pair = change_light(pair, rng)
        if rng.random() < 0.5:  # an object's sharpness must not give away its light
            sigma = max(0.1, scale_length(rng.uniform(0, SOFT), mask.shape))
            pair = np.stack([copy_paste(x, cv2.GaussianBlur(x, (0, 0), sigma), mask) for x in pair])
        masks = torch.from_numpy(mask).float().expand(2, 1, -1, -1)
        return {"image": torch.stack([to_model(x) for x in pair]), "mask": masks, "label": torch.tensor([0, 1])}
