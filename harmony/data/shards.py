"""Preparation in shards, by Lightning's ``Trainer.predict`` in any number of processes.

Each shard is written by one process and moved into place when it is complete. So a killed process loses at most one
shard, and the same command resumes, also with another number of processes.
"""

import warnings
from collections.abc import Callable
from functools import partial

import lightning
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from harmony.core.errors import UserError
from harmony.core.pieces import make_pieces
from harmony.core.progress import tell

QUIET_OPTIONS = {
    "logger": False,
    "callbacks": [],
    "enable_checkpointing": False,
    "enable_progress_bar": False,  # each process prints progress lines instead, for log files
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # ``Shards`` distributes the work itself
    "inference_mode": False,  # tensors that are loaded here may be trained on later
    "precision": "32-true",  # the same shards for every precision of training
    "fast_dev_run": False,  # a short test training needs the whole preparation too
}


def predictor(trainer: Callable[..., lightning.Trainer] | None = None) -> lightning.Trainer:
    """A Trainer for ``make_shards`` with the devices and the strategy of ``trainer``; without it, on one device."""
    default = partial(lightning.Trainer, devices=1, plugins=[LightningEnvironment()])  # ignores how this was started
    return (trainer or default)(**QUIET_OPTIONS)


class Shards(lightning.LightningModule):
    """Work in shards 0, 1, 2, ...; each process makes its share of the missing ones."""

    prepare_data_per_node = False

    def __init__(self, what: str, say: Callable[[str], None] = tell):
        super().__init__()
        self.what, self.say = what, say
        self.plan_result, self.failure = None, None

    def plan(self) -> object:
        """Plan the work, in the first process only; all processes then get the result as ``plan_result``."""

    @property
    def sizes(self) -> list[int]:
        """The number of items of each shard."""
        raise NotImplementedError

    def is_made(self, n: int) -> bool:
        """Whether shard ``n`` exists and is good."""
        raise NotImplementedError

    def make(self, n: int) -> None:
        """Make shard ``n`` on ``self.device`` and move it into place."""
        raise NotImplementedError

    def finish(self) -> None:
        """Finish the work, in the first process only, after all shards are made."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        try:
            self.plan_result = self.plan()
        except UserError as error:  # the other processes wait: the error is raised when they know it
            self.failure = str(error)

    def predict_dataloader(self) -> DataLoader:
        trainer = self.trainer
        self.plan_result, failure = trainer.strategy.broadcast((self.plan_result, self.failure))
        if failure is not None:
            raise UserError(failure) if trainer.is_global_zero else SystemExit(2)
        return DataLoader([None], batch_size=None)  # one step a process, which makes its share

    def predict_step(self, batch: None, index: int) -> None:
        sizes, trainer = self.sizes, self.trainer
        make_pieces(
            self.what, dict(enumerate(sizes)), self.is_made, self.make_one, rank=trainer.global_rank,
            world=trainer.world_size, say=self.say, decimals=0, detail=lambda n: f"shard {n + 1}/{len(sizes)}",
        )  # fmt: skip

    def make_one(self, n: int) -> None:
        """``make``, and stop after it when told to: Lightning checks this only in training."""
        self.make(n)
        if self.trainer.received_sigterm:
            raise SIGTERMException


def make_shards(work: Shards, trainer: lightning.Trainer) -> None:
    """Make the missing shards of ``work`` and finish it; every process returns when everything is done."""
    # isolated, so that the random numbers of a later training do not depend on the missing shards
    with warnings.catch_warnings(), isolate_rng():
        warnings.filterwarnings("ignore", ".*(does not have many workers|across ranks is zero|predict returned None).*")
        try:
            trainer.predict(work, return_predictions=False)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns it into an exit
                raise error.__context__ from None
            raise
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        work.finish()
    trainer.strategy.barrier()


def hand_over(source: lightning.Trainer, target: lightning.Trainer) -> None:
    """Hand the processes of the ``source`` Trainer over to ``target``, which ends them and starts none."""
    launchers = source.strategy.launcher, target.strategy.launcher
    if all(isinstance(launcher, _SubprocessScriptLauncher) for launcher in launchers):
        launchers[1].procs = launchers[0].procs
