"""F3. LightningDataModules: pixels for the kit's encoders, cached latents for everything that trains a UNet."""

import lightning
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler

from harmony.data.pool import PixelPool


class PixelData(lightning.LightningDataModule):
    """Squares of ``size`` pixels from a manifest, photographs making up ``photos`` of each batch.

    ``share`` is the range of a photograph's shorter side that a random crop takes (low for the VAE, near 1 where the
    caption must stay true). Batches: ``image`` B x 3 x H x W in [-1, 1], ``caption`` list, ``render`` B bool.
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

    def setup(self, stage=None):
        h = self.hparams
        if not self.pools:
            self.pools["train"] = PixelPool(h.manifest, "train", h.size, tuple(h.share), h.seed)
            self.pools["test"] = PixelPool(h.manifest, "test", h.size)

    def train_dataloader(self):
        h, pool = self.hparams, self.pools["train"]
        render = torch.tensor([pool.is_render(i) for i in range(len(pool))])
        total = max(1, int((~render).sum()))
        weight = torch.where(render, (1 - h.photos) / max(1, int(render.sum())), h.photos / total)
        sampler = WeightedRandomSampler(weight, len(pool), generator=torch.Generator().manual_seed(h.seed))
        return DataLoader(pool, h.batch_size, sampler=sampler, num_workers=h.workers, drop_last=True)

    def val_dataloader(self):
        return DataLoader([0])

    def captions(self) -> set[str]:
        """All training captions: what tokenizers are learnt from."""
        return {row.caption for row in self.pools["train"].rows}

    def held_out(self, limit: int = 192) -> dict[str, torch.Tensor]:
        """``renders`` and ``photos`` of the test split, N x 3 x H x W in [-1, 1]."""
        pool = self.pools["test"]
        chosen = {"renders": [], "photos": []}
        for i in range(len(pool)):
            images = chosen["renders" if pool.is_render(i) else "photos"]
            if len(images) < limit:
                images.append(pool[i]["image"])
        return {kind: torch.stack(images) for kind, images in chosen.items() if images}

    def retrieval(self, limit: int = 64) -> tuple[torch.Tensor, list[str]]:
        """The first ``limit`` test renders with distinct captions."""
        pool, images, captions = self.pools["test"], [], []
        for i in range(len(pool)):
            if pool.is_render(i) and pool.rows[i].caption not in captions and len(images) < limit:
                item = pool[i]
                images.append(item["image"])
                captions.append(item["caption"])
        return torch.stack(images), captions

    def sample(self, count: int) -> torch.Tensor:
        """``count`` training pictures in the proportions of a batch, N x 3 x H x W in [-1, 1]."""
        loader = iter(self.train_dataloader())
        return torch.cat([next(loader)["image"] for _ in range(-(-count // self.hparams.batch_size))])[:count]
