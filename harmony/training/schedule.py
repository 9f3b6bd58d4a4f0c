"""AdamW on the device or in host memory, and learning-rate factors as functions of the step n = 0, 1, 2, ...

The warm-up factor is (n + 1) / W, not n / W, with which the first step would change nothing. That of Paint by Example
starts at 1e-6 instead.
"""

import math
from collections.abc import Callable, Iterable

import lightning
import torch
from lightning.pytorch.callbacks import Timer
from torch.optim.adamw import adamw as update

from harmony.core.errors import UserError
from harmony.core.progress import tell
from harmony.models.backbone import memory_format


def warm_up(warmup: int = 0) -> Callable[[int], float]:
    """The factor that grows linearly from 1 / W to 1 over W steps, then stays (Liu 2025: W = 10,000)."""
    return lambda n: min(1.0, (n + 1) / max(1, warmup))


def warm_up_from(warmup: int, start: float = 1e-6) -> Callable[[int], float]:
    """The factor that grows linearly from ``start`` to 1 over W steps, then stays (code of Yang 2022: W = 10,000)."""
    return lambda n: min(1.0, start + (1 - start) * n / warmup) if warmup else 1.0


def decay_linearly(total: int, warmup: int = 0) -> Callable[[int], float]:
    """The factor of ``warm_up`` times a linear decay to 0 at ``total`` steps."""
    return lambda n: min(1.0, (n + 1) / max(1, warmup)) * max(0.0, (total - n) / max(1, total))


def find_timer(trainer: lightning.Trainer) -> Timer | None:
    """The clock of ``trainer.max_time``; None for a run that steps alone end."""
    return next((c for c in trainer.callbacks if isinstance(c, Timer) and c.time_remaining() is not None), None)


def decay_to_end(trainer: lightning.Trainer, warmup: int = 0) -> Callable[[int], float]:
    """The factor of ``warm_up`` times a linear decay to 0 at the end of the run, by steps or by clock.

    UserError for a run without end, in which no rate can decay, and for several processes that only the clock ends:
    their rates would differ, and so their weights.
    """
    total, timer = trainer.estimated_stepping_batches, find_timer(trainer)
    steps = decay_linearly(int(total), warmup) if math.isfinite(total) else None
    if steps is None and (timer is None or trainer.world_size > 1):
        raise UserError("a learning rate that decays needs an end: set trainer.max_steps")
    if timer is None:
        return steps
    if trainer.world_size > 1:
        tell("several processes: the learning rate decays by trainer.max_steps, not by trainer.max_time")
        return steps

    def factor(n: int) -> float:
        remaining, elapsed = timer.time_remaining(), timer.time_elapsed()
        by_clock = warm_up(warmup)(n) * max(0.0, remaining / (remaining + elapsed))
        return by_clock if steps is None else min(by_clock, steps(n))

    return factor


def estimate_seconds_left(trainer: lightning.Trainer, seconds_per_step: float) -> float:
    """Seconds until the run ends, by its steps or by its clock; infinite for a run without end."""
    by_steps, timer = trainer.estimated_stepping_batches - trainer.global_step, find_timer(trainer)
    seconds = by_steps * seconds_per_step
    return seconds if timer is None else min(seconds, timer.time_remaining())


class HostAdamW(torch.optim.AdamW):
    """AdamW with its moments and its update in host memory (ZeRO-Offload; Ren 2021).

    Of the 16 bytes that AdamW needs for a trained parameter, 8 leave the device; weights and gradients cross the bus in
    every step. The update is that of AdamW's fused CPU kernel.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            options = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": group["eps"]}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not (state := self.state[p]):
                    zeros = torch.zeros_like(p, device="cpu")
                    state |= {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
                weight = p.cpu()  # on the CPU this is ``p`` itself
                update(
                    [weight], [p.grad.cpu()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
                    fused=True, amsgrad=False, beta1=beta1, beta2=beta2, maximize=False, **options,
                )  # fmt: skip
                if weight is not p:
                    p.copy_(weight)
        return loss


def set_memory_format(net: torch.nn.Module) -> torch.nn.Module:
    """Put a net into the memory format of the default device, on which it will be trained.

    For ``configure_model``, which runs before optimizer and gradient buffers copy the layout of the weights.
    """
    return torch.nn.Module.to(net, memory_format=memory_format(torch.get_default_device()))


def place_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW's moments the layout of their weights, and put those of ``HostAdamW`` into host memory.

    A checkpoint restores both as they were on the machine that wrote it, but the fused update reads weights and
    moments in the order of memory.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # out of Lightning's wrapper
    is_host = isinstance(optimizer, HostAdamW)
    for p, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moment = torch.empty_like(p, device="cpu" if is_host else p.device)
            state[name] = moment.copy_(state[name])


def make_adamw(
    parameters: Iterable,
    trainer: lightning.Trainer,
    lr: float,
    weight_decay: float,
    warmup: int,
    decay: bool,
    warmup_rule: Callable[[int], Callable[[int], float]] = warm_up,
    offload: bool = False,
) -> dict:
    """AdamW with its schedule, in the form that Lightning expects.

    ``decay``: linear warm-up, then linear decay to 0 at the end; otherwise ``warmup_rule``. The update is one kernel
    (fused) unless gradients are clipped: Lightning's mixed precision refuses both together. ``offload``: use
    ``HostAdamW``.
    """
    options = {} if offload else {"fused": not trainer.gradient_clip_val}
    optimizer = (HostAdamW if offload else torch.optim.AdamW)(parameters, lr=lr, weight_decay=weight_decay, **options)
    factor = decay_to_end(trainer, warmup) if decay else warmup_rule(warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
