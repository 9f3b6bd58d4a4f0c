"""What watches a training: sample grids, throughput, the NaN guard, atomic checkpoints, the run folder's CSV."""

import csv
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from harmony.core.errors import UserError
from harmony.core.files import replace_file
from harmony.evaluation.eval_sets import load_reconstruct, sample_grid
from harmony.methods.method import seeds_of
from harmony.pixels.images import write_image
from harmony.sampling.guidance import Settings


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints appear under their name only when complete: a kill while writing leaves the previous one."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        try:
            with replace_file(path) as partial:
                torch.save(checkpoint, partial)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot write checkpoint {path} ({error}): free some disk; the same command goes on"
            ) from error

    def load_checkpoint(self, path, map_location=None, weights_only=True):
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else "it ends too early"
            raise UserError(
                f"checkpoint {path} is damaged ({reason}): remove it and the same command begins anew"
            ) from None


class NaNGuard(Callback):
    """Stop with one clear line when the loss is not finite; the last checkpoint is then from before it.

    The flag stays on the device and is read every ``every`` steps, and before each checkpoint, which also looks at the
    trained weights: the step of a finite loss may have been the one that spoilt them.
    """

    def __init__(self, every: int = 10):
        self.every, self.bad = every, None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        wrong = ~torch.isfinite(outputs["loss"].detach())
        self.bad = wrong if self.bad is None else self.bad | wrong
        if trainer.global_step % self.every == 0:
            self.look(trainer)

    def look(self, trainer):
        if self.bad is not None and bool(self.bad):
            last = trainer.checkpoint_callback.last_model_path if trainer.checkpoint_callback else ""
            where = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            raise UserError(f"the loss became NaN or infinite by step {trainer.global_step}; {where}; lower module.lr")

    def on_save_checkpoint(self, trainer, module, checkpoint):
        spoilt = torch.stack([~torch.isfinite(p.detach()).all() for p in module.parameters() if p.requires_grad]).any()
        self.bad = spoilt if self.bad is None else self.bad | spoilt
        self.look(trainer)


class Throughput(Callback):
    """Images a second since the last report, and the time that is left; logged and printed every ``every`` steps."""

    def __init__(self, every: int = 50):
        self.every = every

    def on_train_start(self, trainer, module):
        self.mark, self.step = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        done = trainer.global_step - self.step
        if done == 0 or trainer.global_step % self.every:
            return
        seconds = time.monotonic() - self.mark
        size = len(next(v for v in batch.values() if isinstance(v, torch.Tensor)))
        rate = done * size * trainer.world_size * trainer.accumulate_grad_batches / seconds
        module.log("train/images_per_second", rate)
        if trainer.is_global_zero:
            left = (trainer.max_steps - trainer.global_step) * seconds / done
            loss = float(outputs["loss"].detach())
            of = f"{trainer.global_step}/{trainer.max_steps}"
            print(f"step {of}: loss {loss:.4f}, {rate:.0f} images a second, {left:.0f} s left", flush=True)
        self.mark, self.step = time.monotonic(), trainer.global_step


class MetricsCSV(Callback):
    """``metrics.csv`` of the run folder: step, name, value. A resumed run goes on below its last step."""

    def __init__(self, folder: str):
        self.path = Path(folder) / "metrics.csv"

    def on_train_start(self, trainer, module):
        self.last = -1
        if trainer.is_global_zero:
            rows = []
            if self.path.exists():
                with open(self.path, newline="") as file:
                    rows = [
                        r
                        for r in csv.reader(file)
                        if len(r) == 3 and r[0].isdigit() and int(r[0]) <= trainer.global_step
                    ]
            with replace_file(self.path) as partial:
                self.write(partial, [["step", "name", "value"], *rows], "w")

    def write(self, path, rows, mode):
        with open(path, mode, newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    def report(self, trainer, measured: Callable[[str], bool]):
        """Write what was measured now: logged_metrics keeps the last validation's figures while training goes on."""
        if trainer.is_global_zero:
            now = {k: float(v) for k, v in trainer.logged_metrics.items() if measured(k)}
            self.write(self.path, [(trainer.global_step, name, f"{value:.6g}") for name, value in now.items()], "a")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step % trainer.log_every_n_steps == 0 and trainer.global_step != self.last:
            self.last = trainer.global_step
            self.report(trainer, lambda name: name.startswith("train/"))

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.report(trainer, lambda name: not name.startswith("train/"))


class SampleGrid(Callback):
    """The same held-out pictures with the same noise: input, what the task sees, its baseline, its output, truth."""

    def __init__(
        self, folder: str, count: int = 8, every: int = 500, steps: int = 20, guidance: float = 2.0, seed: int = 0
    ):
        self.folder, self.count, self.every, self.seed = Path(folder) / "grids", count, every, seed
        self.settings = Settings(steps=steps, guidance=guidance)
        self.items = self.before = self.drawn = None

    def draw(self, trainer, module):
        if self.drawn == trainer.global_step:  # the step's further batches under accumulation, and the end of training
            return
        self.drawn = trainer.global_step
        if self.items is None:
            manifest, resolution = trainer.datamodule.manifest, module.backbone.resolution
            self.items = load_reconstruct(manifest, "validation", resolution, self.count)
        composites, seeds = self.items.composites, seeds_of(self.seed, range(len(self.items)))
        module.eval()
        if self.before is None or not module.fixed_baseline:
            self.before = module.baseline(self.settings).fill(composites, seeds)
        result = module.result(self.settings)
        columns = {**result.views(composites), "baseline": self.before, "output": result.fill(composites, seeds)}
        module.train()
        picture = sample_grid(self.items, columns)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"samples_{trainer.global_step:06d}.png"
        write_image(path, picture)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("samples", [picture], caption=[path.name])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step and trainer.global_step % self.every == 0 and trainer.is_global_zero:
            self.draw(trainer, module)

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero and not trainer.interrupted:
            self.draw(trainer, module)


def trainer_callbacks(callbacks) -> list[lightning.Callback]:
    """The callbacks of a configuration node (a mapping by name, None entries switched off), as Lightning wants them."""
    return [c for c in callbacks.values() if c is not None]
