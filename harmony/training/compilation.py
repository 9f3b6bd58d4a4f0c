"""Messages while the first step of a run is compiled."""

import hashlib
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch._functorch import config
from torch._inductor.runtime.cache_dir_utils import cache_dir

from harmony.core.files import write_json


class Compilation(Callback):
    """Says that the first step is compiled, how long that took last time, and how long it took now.

    The seconds are stored in inductor's cache, so that they are deleted with it. The backward pass is compiled together
    with the forward pass: on a GPU it would otherwise be compiled in a thread of autograd, and the main thread, which
    waits for it, would not handle signals.
    """

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        config.force_non_lazy_backward_lowering = True
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # of diffusers
        self.start = None

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        if self.start is not None:
            return
        self.start, self.file, duration = time.monotonic(), self.find_file(trainer, module, batch), "takes minutes"
        if self.file.exists():
            duration = f"took {json.loads(self.file.read_text()):.0f} s last time"
        self.say(trainer, f"compiling the first step, which {duration}")

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        if self.file is None:
            return
        seconds = time.monotonic() - self.start
        if trainer.is_global_zero:
            write_json(self.file, round(seconds, 1))
        self.say(trainer, f"compiled: the first step took {seconds:.0f} s")
        self.file = None

    def find_file(self, trainer: Trainer, module: LightningModule, batch: dict[str, Tensor]) -> Path:
        """The file of the seconds for this task, backbone, precision, batch, device and version of torch."""
        is_gpu = module.device.type == "cuda"
        device = torch.cuda.get_device_name(module.device) if is_gpu else "cpu"
        facts = [
            type(module).__name__,
            *module.controls,
            module.backbone.name,
            module.backbone.dtype,
            trainer.precision,
        ]
        facts += [*batch["noise"].shape, device, torch.__version__]
        key = hashlib.sha256(" ".join(map(str, facts)).encode()).hexdigest()
        return Path(cache_dir()) / "harmony" / f"{key[:16]}.json"

    def say(self, trainer: Trainer, line: str) -> None:
        if trainer.is_global_zero:
            print(line, flush=True)
