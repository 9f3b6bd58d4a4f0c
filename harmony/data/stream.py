"""The order of training samples and their random numbers, which depend only on seed and position."""

import itertools
from collections.abc import Iterator

import lightning
import numpy as np
import torch
from torch.utils.data import Sampler


class Stream(Sampler[tuple[int, int]]):
    """An endless stream of (position, item): position p is the p-th sample of the whole run.

    The items are shuffled again in each pass, by (seed, pass). Rank r of R takes its share of each global batch, and a
    resumed run starts at the position where it stopped. So one process, eight processes and a resumed run get the same
    samples. With ``shares`` (of each item, sum 1) there are no passes: each item is drawn by (seed, position).
    """

    def __init__(
        self,
        length: int,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        shares: np.ndarray | None = None,
    ):
        self.length, self.batch, self.seed, self.rank, self.world, self.start = length, batch, seed, rank, world, start
        self.ends = None if shares is None else np.cumsum(shares) / np.cumsum(shares)[-1]

    @classmethod
    def of(
        cls, trainer: lightning.Trainer, length: int, batch: int, seed: int, shares: np.ndarray | None = None
    ) -> "Stream":
        """The stream of this process of ``trainer``, from its current step on."""
        start = trainer.global_step * trainer.accumulate_grad_batches
        return cls(length, batch, seed, trainer.global_rank, trainer.world_size, start, shares)

    def item(self, position: int) -> int:
        """The item at ``position``."""
        if self.ends is not None:
            draw = np.random.default_rng([self.seed, position]).random()
            return int(np.searchsorted(self.ends, draw, side="right"))
        number = position // self.length
        if getattr(self, "number", None) != number:  # shuffle once for each pass
            self.number = number
            self.order = np.random.default_rng([self.seed, number]).permutation(self.length)
        return int(self.order[position % self.length])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for n in itertools.count(self.start):  # global batches
            first = (n * self.world + self.rank) * self.batch
            for position in range(first, first + self.batch):
                yield position, self.item(position)


def generator(seed: int, position: int) -> torch.Generator:
    """The source of all random numbers of the sample at ``position``."""
    return torch.Generator().manual_seed((seed * 1_000_003 + position) % 2**63)
