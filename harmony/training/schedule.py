"""F4. AdamW, and learning-rate factors as functions of the optimiser step n = 0, 1, 2, ...

The warm-up factor is (n + 1) / W, not n / W: with the latter the first step would change nothing (method sheet, 1.4).
Paint by Example's begins at 1e-6 instead.
"""

import math
from collections.abc import Callable, Iterable

import lightning
import torch

from harmony.errors import UserError


def constant(warmup: int = 0) -> Callable[[int], float]:
    """Linear from 1 / W to 1 over W steps, then constant (the paper's schedule, W = 10,000)."""
    return lambda n: min(1.0, (n + 1) / max(1, warmup))


def warm_up(warmup: int, start: float = 1e-6) -> Callable[[int], float]:
    """Linear from ``start`` to 1 over W steps, then constant (Paint by Example's schedule, W = 10,000)."""
    return lambda n: min(1.0, start + (1 - start) * n / warmup) if warmup else 1.0


def linear_decay(total: int, warmup: int = 0) -> Callable[[int], float]:
    """Linear warm-up over W steps, then linear to 0 at ``total`` steps."""
    return lambda n: min(1.0, (n + 1) / max(1, warmup)) * max(0.0, (total - n) / max(1, total))


def total_steps(trainer) -> int:
    """Optimiser steps of the whole run. UserError when nothing ends it, since a decay needs an end."""
    total = trainer.estimated_stepping_batches
    if not math.isfinite(total):
        raise UserError("a learning rate that decays needs an end: set trainer.max_steps")
    return int(total)


def adamw(
    parameters: Iterable,
    trainer: lightning.Trainer,
    lr: float,
    weight_decay: float,
    warmup: int,
    decay: bool,
    begin: Callable[[int], Callable[[int], float]] = constant,
) -> dict:
    """AdamW with its schedule, as Lightning wants them; ``decay``: linear to 0 at the end, else as ``begin`` has it.

    The update is one kernel (fused), unless gradients are clipped: Lightning's mixed precision refuses both together.
    """
    fused = not trainer.gradient_clip_val
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused)
    factor = linear_decay(total_steps(trainer), warmup) if decay else begin(warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
