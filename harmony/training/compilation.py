"""What a run says while its first step is compiled."""

import hashlib
import json
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from torch._functorch import config
from torch._inductor.runtime.cache_dir_utils import cache_dir

from harmony.core.files import write_json


class Compilation(Callback):
    """Says that the first step is compiled, how long it took last time and how long it took now.

    The seconds are kept in inductor's cache, so that they go when it goes. The backward pass is compiled together with
    the forward pass: on a GPU it would else be compiled in a thread of autograd, for which the main thread waits
    without looking at signals.
    """

    def on_train_start(self, trainer, module):
        config.force_non_lazy_backward_lowering = True
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # diffusers asks so
        self.began = None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.began is not None:
            return
        self.began, self.kept, last = time.monotonic(), self.file(trainer, module, batch), "takes minutes"
        if self.kept.exists():
            last = f"took {json.loads(self.kept.read_text()):.0f} s last time"
        self.say(trainer, f"compiling the first step, which {last}")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.kept is None:
            return
        seconds = time.monotonic() - self.began
        if trainer.is_global_zero:
            write_json(self.kept, round(seconds, 1))
        self.say(trainer, f"compiled: the first step took {seconds:.0f} s")
        self.kept = None

    def file(self, trainer, module, batch: dict[str, torch.Tensor]) -> Path:
        """Where the seconds of this task, backbone, precision and batch are kept, for this device and torch."""
        gpu = module.device.type == "cuda"
        device = torch.cuda.get_device_name(module.device) if gpu else "cpu"
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

    def say(self, trainer, line: str) -> None:
        if trainer.is_global_zero:
            print(line, flush=True)
