"""Callbacks of a training: sample grids, throughput, the NaN guard, checkpoints, the CSV of metrics."""

import csv
import math
import pickle
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from harmony.core.errors import UserError
from harmony.core.files import replace_file
from harmony.evaluation.eval_sets import load_reconstruct, sample_grid
from harmony.methods.method import make_seeds
from harmony.pixels.images import write_image
from harmony.sampling.guidance import Settings
from harmony.training.checkpoints import list_trained, read_checkpoint, read_facts
from harmony.training.schedule import estimate_seconds_left
from harmony.training.task import Task


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically: a kill while writing leaves the previous one in place."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        try:
            with replace_file(path) as partial:
                torch.save(checkpoint, partial)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot write checkpoint {path} ({error}): free some disk space; the same command continues"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else "it ends too early"
            raise UserError(
                f"checkpoint {path} is damaged ({reason}): remove it, and the same command starts from the beginning"
            ) from None


class NaNGuard(Callback):
    """Stops a training with one clear line, before the next checkpoint, when loss or weights are not finite.

    The flag stays on the device and is read every ``every`` steps and before each checkpoint. The latter also checks
    the trained weights, because a step with a finite loss can make them infinite.
    """

    def __init__(self, every: int = 10):
        self.every, self.is_bad = every, None

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Mapping[str, Tensor], batch: Any, batch_idx: int
    ) -> None:
        self.add(~torch.isfinite(outputs["loss"].detach()))
        if trainer.global_step % self.every == 0:
            self.check(trainer)

    def add(self, is_bad: Tensor) -> None:
        """Set the flag where ``is_bad`` is true."""
        self.is_bad = is_bad if self.is_bad is None else self.is_bad | is_bad

    def check(self, trainer: Trainer) -> None:
        """UserError if the flag is set."""
        if self.is_bad is not None and bool(self.is_bad):
            path = trainer.checkpoint_callback.last_model_path if trainer.checkpoint_callback else ""
            where = f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"
            raise UserError(f"the loss became NaN or infinite by step {trainer.global_step}; {where}; lower module.lr")

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        parameters = [p.detach() for p in module.parameters() if p.requires_grad]
        self.add(torch.stack([~torch.isfinite(p).all() for p in parameters]).any())
        self.check(trainer)


class WeightAverage(Callback):
    """Validates and exports an exponential moving average of the trained weights, and goes on training the last ones.

    ``decay``: about the last 1 / (1 - decay) steps count; fewer at the beginning. 0: there is no average. The average
    is part of every checkpoint.
    """

    def __init__(self, decay: float = 0.0):
        self.decay, self.average, self.state = decay, None, None

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.decay:
            self.average = EMAModel(list_trained(module), self.decay, use_ema_warmup=True, power=0.75)
            if self.state is not None:
                self.average.load_state_dict(self.state)
            self.average.to(module.device)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self.average is not None and trainer.global_step != self.step:  # gradients may be accumulated
            self.average.step(list_trained(module))
            self.step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.average is not None:
            self.average.store(list_trained(module))
            self.average.copy_to(list_trained(module))

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.average is not None:
            self.average.restore(list_trained(module))

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.average is not None:
            self.average.copy_to(list_trained(module))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.average is None else self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state or None


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint with the best value of a validation figure, ``best.ckpt``.

    A training that does not log the figure has none: UserError where ``is_required``, else nothing happens. The file
    itself holds the best value, because the last checkpoint, from which a run goes on, may be older.
    """

    is_required = False

    def __init__(self, dirpath: str, monitor: str, mode: str):
        options = {"save_on_train_epoch_end": False, "enable_version_counter": False}
        super().__init__(dirpath, "best", monitor=monitor, mode=mode, **options)

    @property
    def state_key(self) -> str:
        return type(self).__name__

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: ``on_fit_start`` reads the file."""

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        path = self.format_checkpoint_name({})
        value, failure = trainer.strategy.broadcast(self.read_value(Path(path)) if trainer.is_global_zero else None)
        if failure:  # on all ranks, none of which must wait for the others
            raise UserError(failure)
        if value is not None:
            self.best_model_path = self.kth_best_model_path = path
            self.best_model_score = self.kth_value = torch.tensor(value)
            self.best_k_models = {path: self.best_model_score}

    def read_value(self, path: Path) -> tuple[float | None, str]:
        """(value of the figure in the file, None where there is no file or one by another figure; what is wrong)."""
        try:
            facts = read_facts("best", read_checkpoint(path), path) if path.exists() else {}
        except UserError as error:
            return None, str(error)
        return facts["value"] if facts.get("figure") == self.monitor else None, ""

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Keep the checkpoint if it is the best; also in ``validate`` behind the last step of a run that was killed."""
        if trainer.sanity_checking or trainer.fast_dev_run:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None and self.is_required:
            names = ", ".join(sorted(n for n in trainer.callback_metrics if not n.startswith("train/"))) or "none"
            raise UserError(
                f"checkpoint=best: the validation logs no {self.monitor} but {names}: give one of them as "
                "callbacks.best.monitor, or checkpoint=last"
            )
        if value is not None and trainer.strategy.reduce_boolean_decision(bool(value.isfinite())):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


def read_metrics(path: Path) -> list[tuple[int, str, float]]:
    """The rows (step, name, value) of a ``metrics.csv``; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        rows = csv.DictReader(file, ("step", "name", "value"))  # a run that was stopped early has no header
        whole = (row for row in rows if row["step"].isdigit() and row["value"])  # not where a killed run broke off
        return [(int(row["step"]), row["name"], float(row["value"])) for row in whole]


def read_last_metrics(path: Path) -> dict[str, float]:
    """The last value of each name in a ``metrics.csv``."""
    return {name: value for _, name, value in read_metrics(path)}


def read_validation(path: Path, step: int) -> dict[str, float]:
    """The figures in a ``metrics.csv`` of the validation after a step."""
    return {name: value for n, name, value in read_metrics(path) if n == step and not name.startswith("train/")}


class Throughput(Callback):
    """Logs and prints images a second and the remaining time, every ``every`` steps."""

    def __init__(self, every: int = 50):
        self.every = every

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.mark, self.step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Mapping[str, Tensor], batch: Any, batch_idx: int
    ) -> None:
        steps = trainer.global_step - self.step
        if steps == 0 or trainer.global_step % self.every:
            return
        seconds = time.monotonic() - self.mark
        size = len(next(v for v in batch.values() if isinstance(v, Tensor)))
        rate = steps * size * trainer.world_size * trainer.accumulate_grad_batches / seconds
        module.log("train/images_per_second", rate)
        if trainer.is_global_zero:
            total, left = trainer.estimated_stepping_batches, estimate_seconds_left(trainer, seconds / steps)
            step = f"{trainer.global_step}/{total:.0f}" if math.isfinite(total) else f"{trainer.global_step}"
            end = f", {left:.0f} s left" if math.isfinite(left) else ""
            loss = float(outputs["loss"].detach())
            print(f"step {step}: loss {loss:.4f}, {rate:.0f} images a second{end}", flush=True)
        self.mark, self.step = time.monotonic(), trainer.global_step


class MetricsCSV(Callback):
    """Writes ``metrics.csv`` of the run folder: step, name, value. A resumed run continues below its last step."""

    def __init__(self, folder: str):
        self.path = Path(folder) / "metrics.csv"

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.last_step = -1
        if trainer.is_global_zero:
            rows = []
            if self.path.exists():
                with open(self.path, newline="") as file:
                    rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit()]
                rows = [row for row in rows if int(row[0]) <= trainer.global_step]
            with replace_file(self.path) as partial:
                self.write(partial, [["step", "name", "value"], *rows], "w")

    def write(self, path: Path, rows: Iterable[Sequence], mode: str) -> None:
        with open(path, mode, newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    def report(self, trainer: Trainer, is_new: Callable[[str], bool]) -> None:
        """Write the new metrics: ``logged_metrics`` keeps those of the last validation while training continues."""
        if trainer.is_global_zero:
            figures = {k: float(v) for k, v in trainer.logged_metrics.items() if is_new(k)}
            rows = [(trainer.global_step, name, f"{value:.6g}") for name, value in figures.items()]
            self.write(self.path, rows, "a")

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Mapping[str, Tensor], batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0 and trainer.global_step != self.last_step:
            self.last_step = trainer.global_step
            self.report(trainer, lambda name: name.startswith("train/"))

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.report(trainer, lambda name: not name.startswith("train/"))


class SampleGrid(Callback):
    """Draws the same held-out pictures with the same noise: input, the task's views, baseline, output, truth."""

    def __init__(
        self, folder: str, count: int = 8, every: int = 500, steps: int = 20, guidance: float = 2.0, seed: int = 0
    ):
        self.folder, self.count, self.every, self.seed = Path(folder) / "grids", count, every, seed
        self.settings = Settings(steps=steps, guidance=guidance)
        self.items = self.baseline_pictures = self.last_step = None

    def draw(self, trainer: Trainer, module: Task) -> None:
        """Write the grid of this step, once."""
        if self.last_step == trainer.global_step:  # accumulation has several batches a step; training may end in it
            return
        self.last_step = trainer.global_step
        if self.items is None:
            manifest, resolution = trainer.datamodule.manifest, module.backbone.resolution
            self.items = load_reconstruct(manifest, "validation", resolution, self.count)
        composites, seeds = self.items.composites, make_seeds(self.seed, range(len(self.items)))
        module.eval()
        if self.baseline_pictures is None or not module.fixed_baseline:
            self.baseline_pictures = module.baseline(self.settings).fill(composites, seeds)
        result = module.result(self.settings)
        columns = {
            **result.views(composites),
            "baseline": self.baseline_pictures,
            "output": result.fill(composites, seeds),
        }
        module.train()
        picture = sample_grid(self.items, columns)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"samples_{trainer.global_step:06d}.png"
        write_image(path, picture)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("samples", [picture], caption=[path.name])

    def on_train_batch_end(
        self, trainer: Trainer, module: Task, outputs: Mapping[str, Tensor], batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step and trainer.global_step % self.every == 0 and trainer.is_global_zero:
            self.draw(trainer, module)

    def on_train_end(self, trainer: Trainer, module: Task) -> None:
        if trainer.is_global_zero and not trainer.interrupted:
            self.draw(trainer, module)


def list_callbacks(callbacks: Mapping[str, Callback | None]) -> list[Callback]:
    """The callbacks of a configuration node, a mapping by name in which None means off."""
    return [c for c in callbacks.values() if c is not None]
