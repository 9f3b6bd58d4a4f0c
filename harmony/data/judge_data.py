"""Composites for the judge: photographs, and the same photographs with the object under another light."""

from pathlib import Path

import cv2
import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from harmony.core.errors import UserError
from harmony.core.progress import Progress
from harmony.data.latent_cache import Recipe, example
from harmony.data.manifest import read_split
from harmony.data.stream import Stream
from harmony.pixels.composites import change_light, copy_paste
from harmony.pixels.images import to_model
from harmony.pixels.masks import scale_length

MIN_DIFFERENCE = 8.0  # gray levels: smallest mean change of an object under another light
MAX_BLUR = 10.0  # px at 512: largest blur of an object
DRAWS = 8  # number of lights that are tried until one is visible


class JudgeData(lightning.LightningDataModule):
    """Composites of a manifest for the judge, ``batch_size`` pairs at a time.

    ``photos`` is the share of photographs in a batch if the manifest has renders too. The two validation loaders return
    each picture of the validation and of the test split once.
    """

    def __init__(self, manifest: str, side: int, batch_size: int, photos: float = 0.5, workers: int = 0, seed: int = 0):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.sets: dict[str, Composites] = {}

    def setup(self, stage: str | None = None) -> None:
        h = self.hparams
        for split in ("train", "validation", "test"):
            if split not in self.sets:
                crop, photos = ("jitter", h.photos) if split == "train" else ("center", None)
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


def change_light_visibly(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change the light of ``image`` until the change is visible in ``mask``, in at most ``DRAWS`` draws."""
    for _ in range(DRAWS):
        picture = change_light(image, rng)
        if np.abs(picture[mask].astype(np.float32) - image[mask]).mean() >= MIN_DIFFERENCE:
            break
    return picture


class Composites(torch.utils.data.Dataset):
    """Pairs of a picture with its object under another light (label 0) and the same picture as it is (label 1).

    The pictures are squares of ``side`` R of a manifest's split, kept in memory. The two of a pair differ only in the
    light: ``image`` 2 x 3 x R x R in [-1, 1], ``mask`` 2 x 1 x R x R and ``label`` 2, drawn from (seed, position). The
    other light is a random change of exposure, white balance and contrast, or, in half of the draws if the dataset has
    one, the render under a second light. Pictures without a second light are repeated until their share is ``photos``
    (None: not repeated).
    """

    def __init__(self, manifest: Path, split: str, side: int, crop: str, seed: int, photos: float | None = None):
        self.seed, rows = seed, read_split(manifest, split)
        recipe, root = Recipe(crop=crop, mismatch=1.0, seed=seed), Path(manifest).parent
        progress = Progress(f"reading {split}", len(rows), "pictures")
        self.examples, self.has_relit, self.ids = [], [], [row.id for row in rows]
        for row in rows:
            square = example(row, root, recipe, side)
            self.examples.append((square.image, square.mask, square.instance))
            self.has_relit.append("relit" in row.extras)
            progress.advance(1, every=1000)
        self.order = self.repeat(photos)

    def repeat(self, photos: float | None) -> list[int]:
        """The indices of all examples; photographs are repeated until their share is ``photos``."""
        if photos is not None and not 0 <= photos < 1:
            raise UserError(f"data.photos={photos}: give a share from 0 to below 1")
        photographs = [i for i, has_relit in enumerate(self.has_relit) if not has_relit]
        times, renders = 1, len(self.has_relit) - len(photographs)
        if photos and photographs and renders:
            times = max(1, round(photos / (1 - photos) * renders / len(photographs)))
        return [*range(len(self.has_relit)), *photographs * (times - 1)]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        position, i = key[0], self.order[key[1]]
        image, mask, relit = self.examples[i]
        rng = np.random.default_rng([self.seed, position])
        if rng.random() < 0.5:
            image, mask, relit = (np.ascontiguousarray(a[:, ::-1]) for a in (image, mask, relit))
        foreground = relit if self.has_relit[i] and rng.random() < 0.5 else change_light_visibly(image, mask, rng)
        pair = np.stack([copy_paste(image, foreground, mask), image])
        if rng.random() < 0.25:  # of the whole picture, because no exposure is wrong in itself
            pair = change_light(pair, rng)
        if rng.random() < 0.5:  # so that the judge cannot tell the light from the object's sharpness
            sigma = max(0.1, scale_length(rng.uniform(0, MAX_BLUR), mask.shape))
            pair = np.stack([copy_paste(x, cv2.GaussianBlur(x, (0, 0), sigma), mask) for x in pair])
        masks = torch.from_numpy(mask).float().expand(2, 1, -1, -1)
        return {"image": torch.stack([to_model(x) for x in pair]), "mask": masks, "label": torch.tensor([0, 1])}
