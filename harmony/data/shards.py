"""Preparation at scale: Lightning's ``Trainer.predict`` over any number of processes, one shard at a time.

Work that comes in shards is written shard by shard, each by one process and moved into place when it is complete. So a
kill costs at most a shard a process, and the same command goes on, with the same number of processes or another.
"""

import warnings
from collections.abc import Callable
from functools import partial
from itertools import chain

import lightning
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from harmony.core.errors import UserError
from harmony.core.progress import Progress, tell

QUIET = {
    "logger": False,
    "callbacks": [],
    "enable_checkpointing": False,
    "enable_progress_bar": False,  # each process says how far it is in lines that a log file can hold
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # ``Shards`` shares out itself
    "inference_mode": False,  # what is loaded meanwhile may be trained on later
    "precision": "32-true",  # the same shards whatever precision a training asks for
    "fast_dev_run": False,  # a shortened training stands on a whole preparation
}


def predictor(trainer: Callable[..., lightning.Trainer] | None = None) -> lightning.Trainer:
    """A Trainer that makes shards, with the devices and the strategy of ``trainer``; on one device without."""
    one = partial(lightning.Trainer, devices=1, plugins=[LightningEnvironment()])  # whatever started this process
    return (trainer or one)(**QUIET)


class Shards(lightning.LightningModule):
    """Work in shards 0, 1, 2, ..., of which each process makes its share of those that are missing."""

    prepare_data_per_node = False
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(self, what: str, say: Callable[[str], None] = tell):
        super().__init__()
        self.what, self.say = what, say
        self.planned, self.failure = None, None

    def plan(self) -> object:
        """In the first process, before all others go on, however long it takes; they get the result as ``planned``."""

    @property
    def sizes(self) -> list[int]:
        """Items of each shard."""
        raise NotImplementedError

    def is_made(self, n: int) -> bool:
        """Whether shard ``n`` is there and good."""
        raise NotImplementedError

    def make(self, n: int) -> None:
        """Make shard ``n`` on ``self.device`` and move it into place."""
        raise NotImplementedError

    def finish(self) -> None:
        """In the first process, when all shards are made."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        try:
            self.planned = self.plan()
        except UserError as error:  # the other processes wait for this one: it says what is wrong when they know
            self.failure = str(error)

    def predict_dataloader(self) -> DataLoader:
        trainer = self.trainer
        self.planned, failure = trainer.strategy.broadcast((self.planned, self.failure))
        if failure is not None:
            raise UserError(failure) if trainer.is_global_zero else SystemExit(2)
        rank, world, sizes = trainer.global_rank, trainer.world_size, self.sizes
        looked_at = [n for n in range(rank, len(sizes), world) if not self.is_made(n)]
        own = sorted(chain.from_iterable(gathered(looked_at, world)))[rank::world]
        self.progress = Progress(self.what, sum(sizes[n] for n in own), "items", self.say, decimals=0)
        return DataLoader(own, batch_size=None)

    def predict_step(self, n: int, index: int) -> None:
        self.make(n)
        self.progress.advance(self.sizes[n], f"shard {n + 1}/{len(self.sizes)}")
        if self.trainer.received_sigterm:  # which Lightning only looks at while it trains
            raise SIGTERMException


def gathered(mine: list[int], world: int) -> list[list[int]]:
    """``mine`` of every process."""
    if world == 1:
        return [mine]
    found: list = [None] * world
    torch.distributed.all_gather_object(found, mine)
    return found


def make_shards(work: Shards, trainer: lightning.Trainer) -> None:
    """Make what is missing of ``work`` and finish it; every process returns when all is done."""
    with warnings.catch_warnings(), isolate_rng():  # a training begins the same whether or not something was missing
        warnings.filterwarnings("ignore", ".*(does not have many workers|across ranks is zero|predict returned None).*")
        try:
            trainer.predict(work, return_predictions=False)
        except SystemExit as left:
            if isinstance(left.__context__, KeyboardInterrupt):  # which Lightning turns into an exit
                raise left.__context__ from None
            raise
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        work.finish()
    trainer.strategy.barrier()


def hand_over(first: lightning.Trainer, trainer: lightning.Trainer) -> None:
    """The processes that the ``first`` Trainer started end with ``trainer``: a second one starts none of its own."""
    launchers = first.strategy.launcher, trainer.strategy.launcher
    if all(isinstance(launcher, _SubprocessScriptLauncher) for launcher in launchers):
        launchers[1].procs = launchers[0].procs
