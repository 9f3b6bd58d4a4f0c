"""Seconds spent inside named modules, measured by forward hooks.

On a GPU the hooks record CUDA events, which are read once at the end, so that the measurement does not slow down the
modules. While a CUDA graph is recorded no event can be recorded, and a replay runs no hooks: the time of a graph is
not counted.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


def now(device: torch.device) -> float:
    """Seconds on a clock, after all work of a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def blocks(net: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of a UNet or ControlNet, lists flattened: they also run if only one half of the network runs."""
    return [m for child in net.children() for m in (child if isinstance(child, torch.nn.ModuleList) else [child])]


class HostClock:
    """A clock for the CPU, whose marks are seconds."""

    @staticmethod
    def mark() -> float:
        return time.perf_counter()

    @staticmethod
    def seconds(start: float, end: float) -> float:
        return end - start


class DeviceClock:
    """A clock for a GPU, whose marks are CUDA events on the current stream; None while a graph is recorded."""

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
def measure_time(modules: Mapping[str, list[torch.nn.Module]], device: torch.device) -> Iterator[Counter]:
    """Yield name -> seconds inside these modules, filled in at the end; no module may contain another."""
    clock = DeviceClock if device.type == "cuda" else HostClock
    seconds, passes, hooks = Counter(), [], []  # passes: [name, mark at the start, mark at the end]

    def start_hook(name: str) -> Callable[..., None]:
        def hook(*args) -> None:
            passes.append([name, clock.mark(), None])

        return hook

    def end_hook(*args) -> None:
        passes[-1][2] = clock.mark()

    for name, parts in modules.items():
        for part in parts:
            hooks += [part.register_forward_pre_hook(start_hook(name)), part.register_forward_hook(end_hook)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()
        for name, start, end in passes:
            if start is not None and end is not None:
                seconds[name] += clock.seconds(start, end)
