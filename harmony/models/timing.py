"""Where the time goes: seconds inside named modules, by their forward hooks.

On a GPU the hooks record events, which the device passes when it gets there, and read them once at the end: what is
timed never waits for its clock. While a CUDA graph is recorded nothing may be asked of the device, and a replay runs no
hooks; what a graph computes is part of the rest.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def blocks(net: torch.nn.Module) -> list[torch.nn.Module]:
    """What a UNet or ControlNet consists of, lists opened: it is these that run when one half of it does."""
    return [m for child in net.children() for m in (child if isinstance(child, torch.nn.ModuleList) else [child])]


class HostClock:
    """Marks are seconds: what runs on the CPU has ended when its call returns."""

    @staticmethod
    def mark() -> float:
        return time.perf_counter()

    @staticmethod
    def seconds(start: float, end: float) -> float:
        return end - start


class DeviceClock:
    """Marks are CUDA events on the current stream; None while a graph is recorded."""

    @staticmethod
    def mark() -> torch.cuda.Event | None:
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000


@contextmanager
def timed(modules: Mapping[str, list[torch.nn.Module]], device: torch.device) -> Iterator[Counter]:
    """Gives name -> seconds inside these modules, filled in at the end; none may lie within another."""
    clock = DeviceClock if device.type == "cuda" else HostClock
    spent, passes, hooks = Counter(), [], []  # passes: [name, mark at the start, mark at the end]

    def enters(name: str) -> Callable[..., None]:
        def hook(*args) -> None:
            passes.append([name, clock.mark(), None])

        return hook

    def leaves(*args) -> None:
        passes[-1][2] = clock.mark()

    for name, parts in modules.items():
        for part in parts:
            hooks += [part.register_forward_pre_hook(enters(name)), part.register_forward_hook(leaves)]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()
        for name, start, end in passes:
            if start is not None and end is not None:
                spent[name] += clock.seconds(start, end)
