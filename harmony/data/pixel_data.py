"""Squares of pixels in memory: the training data of a backbone's VAE, CLIP and captioner."""

import itertools
from pathlib import Path

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from harmony.data.manifest import is_render, read_split, share_out
from harmony.data.stream import Stream
from harmony.pixels.images import Crop, crop_resize, read_image, resize, square_around, to_model


class PixelData(lightning.LightningDataModule):
    """Squares of ``size`` pixels from a manifest; ``photos`` is the share of photographs in a batch.

    ``share`` is the range of a photograph's shorter side that a random crop takes (low for the VAE, near 1 if the
    caption must stay true). A batch is ``image`` B x 3 x H x W in [-1, 1], ``caption`` list, ``render`` B bool, and
    ``noise_seed`` B for what a task draws.
    """

    def __init__(
        self,
        manifest: str,
        size: int,
        batch_size: int,
        photos: float,
        share: tuple[float, float],
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.pools: dict[str, PixelPool] = {}

    def setup(self, stage: str | None = None) -> None:
        h = self.hparams
        if not self.pools:
            self.pools["train"] = PixelPool(h.manifest, "train", h.size, tuple(h.share), h.seed)
            self.pools["test"] = PixelPool(h.manifest, "test", h.size)

    @property
    def shares(self) -> np.ndarray:
        """The share of each training picture in what is trained on, sum 1."""
        pool = self.pools["train"]
        return share_out(np.array([pool.is_render(i) for i in range(len(pool))]), self.hparams.photos)

    def train_dataloader(self) -> DataLoader:
        h, pool = self.hparams, self.pools["train"]
        stream = Stream.of(self.trainer, len(pool), h.batch_size, h.seed, self.shares)
        return DataLoader(pool, h.batch_size, sampler=stream, num_workers=h.workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([0])

    def captions(self) -> set[str]:
        """All training captions, for training a tokenizer."""
        return {row.caption for row in self.pools["train"].rows}

    def test_pictures(self, limit: int = 192) -> dict[str, torch.Tensor]:
        """``renders`` and ``photos`` of the test split, N x 3 x H x W in [-1, 1]."""
        pool = self.pools["test"]
        kinds = {"renders": [], "photos": []}
        for i in range(len(pool)):
            images = kinds["renders" if pool.is_render(i) else "photos"]
            if len(images) < limit:
                images.append(pool.read(i)["image"])
        return {kind: torch.stack(images) for kind, images in kinds.items() if images}

    def retrieval(self, limit: int = 64) -> tuple[torch.Tensor, list[str]]:
        """The first ``limit`` test renders with distinct captions."""
        pool, images, captions = self.pools["test"], [], []
        for i in range(len(pool)):
            if pool.is_render(i) and pool.rows[i].caption not in captions and len(images) < limit:
                item = pool.read(i)
                images.append(item["image"])
                captions.append(item["caption"])
        return torch.stack(images), captions

    def sample(self, count: int) -> torch.Tensor:
        """``count`` training pictures in the proportions of a batch, N x 3 x H x W in [-1, 1]."""
        pool = self.pools["train"]
        order = Stream(len(pool), count, self.hparams.seed, shares=self.shares)
        return torch.stack([pool[key]["image"] for key in itertools.islice(order, count)])


class PixelPool(torch.utils.data.Dataset):
    """Decoded pictures of one split of a manifest as squares of ``size`` pixels.

    An item is ``image`` float 3 x size x size in [-1, 1], ``caption`` and ``render`` (bool). By its number alone
    (``read``) a picture gives the square around its instance. By (position, number) everything random depends on (seed,
    position): a photograph gives a random square of a ``share`` from low to high of its shorter side; renders are not
    cropped, because their captions name what they show; half of the squares are mirrored.
    """

    def __init__(
        self, manifest: str | Path, split: str, size: int, share: tuple[float, float] | None = None, seed: int = 0
    ):
        self.rows = read_split(manifest, split)
        self.size, self.share, self.seed = size, share, seed
        root = Path(manifest).parent
        self.pictures = []
        for row in self.rows:
            picture = read_image(root / row.image)
            shrink = min(1.0, 4 * size / min(picture.shape[:2]))  # crops need no larger photograph
            if shrink < 1:
                picture = resize(picture, round(shrink * picture.shape[1]), round(shrink * picture.shape[0]))
            self.pictures.append(picture)

    def __len__(self) -> int:
        return len(self.rows)

    def is_render(self, i: int) -> bool:
        return is_render(self.rows[i])

    def crop(self, i: int, rng: np.random.Generator | None = None) -> Crop:
        """The square of picture ``i``: with ``rng`` a random one of a photograph, else that around the instance."""
        row, picture = self.rows[i], self.pictures[i]
        height, width = picture.shape[:2]
        if rng is None or is_render(row):
            box = [v * width / row.width for v in row.box]
            return square_around(box, width, height)
        side = max(1, int(min(width, height) * rng.uniform(*self.share)))
        return Crop(int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1)), side)

    def read(self, i: int, rng: np.random.Generator | None = None) -> dict:
        """Picture ``i``, with ``rng`` cropped and mirrored at random."""
        square = crop_resize(self.pictures[i], self.crop(i, rng), self.size)
        if rng is not None and rng.random() < 0.5:
            square = square[:, ::-1]
        row = self.rows[i]
        return {"image": to_model(np.ascontiguousarray(square)), "caption": row.caption, "render": is_render(row)}

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, i = key
        rng = np.random.default_rng([self.seed, position, 1])  # 1: not the numbers that chose the picture
        return self.read(i, rng) | {"noise_seed": int(rng.integers(2**32))}
