"""AdamW, on the device or in host memory; learning-rate factors as functions of the optimiser step n = 0, 1, 2, ...

The warm-up factor is (n + 1) / W, not n / W: with the latter the first step would change nothing.
Paint by Example's begins at 1e-6 instead.
"""

import math
from collections.abc import Callable, Iterable

import lightning
import torch
from torch.optim.adamw import adamw as update

from harmony.core.errors import UserError
from harmony.models.backbone import memory_format


def constant(warmup: int = 0) -> Callable[[int], float]:
    """Linear from 1 / W to 1 over W steps, then constant (Liu 2025: W = 10,000)."""
    return lambda n: min(1.0, (n + 1) / max(1, warmup))


def warm_up(warmup: int, start: float = 1e-6) -> Callable[[int], float]:
    """Linear from ``start`` to 1 over W steps, then constant (released code of Yang 2022: W = 10,000)."""
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


class HostAdamW(torch.optim.AdamW):
    """AdamW whose moments lie in host memory, where the update is made too (ZeRO-Offload; Ren 2021).

    Of the 16 bytes a trained parameter that AdamW needs, 8 leave the device; weights and gradients cross the bus in
    every step. Numbers are those of AdamW's fused kernel on the CPU.
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
                weight = p.cpu()  # the weight itself where the device is the CPU
                update(
                    [weight], [p.grad.cpu()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
                    fused=True, amsgrad=False, beta1=beta1, beta2=beta2, maximize=False, **options,
                )  # fmt: skip
                if weight is not p:
                    p.copy_(weight)
        return loss


def lay_out(net: torch.nn.Module) -> torch.nn.Module:
    """A net that is to be trained, in the memory format of the device that it will be trained on.

    For ``configure_model``, in which that is the default device: before optimizer and gradient buffers take the layout
    of the weights over.
    """
    return torch.nn.Module.to(net, memory_format=memory_format(torch.get_default_device()))


def place_moments(optimizer: torch.optim.Optimizer) -> None:
    """Moments of AdamW laid out as their weights, those of ``HostAdamW`` back in host memory.

    A checkpoint brings both as they were where it was written, and the fused update reads weights and moments in the
    order of memory.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # out of Lightning's wrapper
    host = isinstance(optimizer, HostAdamW)
    for p, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moment = torch.empty_like(p, device="cpu" if host else p.device)
            state[name] = moment.copy_(state[name])


def adamw(
    parameters: Iterable,
    trainer: lightning.Trainer,
    lr: float,
    weight_decay: float,
    warmup: int,
    decay: bool,
    begin: Callable[[int], Callable[[int], float]] = constant,
    offload: bool = False,
) -> dict:
    """AdamW with its schedule, as Lightning wants them; ``decay``: linear to 0 at the end, else as ``begin`` has it.

    The update is one kernel (fused), unless gradients are clipped: Lightning's mixed precision refuses both together.
    ``offload``: it is made in host memory (``HostAdamW``).
    """
    fused = {} if offload else {"fused": not trainer.gradient_clip_val}
    optimiser = (HostAdamW if offload else torch.optim.AdamW)(parameters, lr=lr, weight_decay=weight_decay, **fused)
    factor = linear_decay(total_steps(trainer), warmup) if decay else begin(warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
