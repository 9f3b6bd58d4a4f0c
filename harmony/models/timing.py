"""F2. Where the time goes: seconds inside named modules, by their forward hooks."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
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


@contextmanager
def timed(modules: Mapping[str, list[torch.nn.Module]], device: torch.device) -> Iterator[Counter]:
    """While it lasts, name -> seconds inside these modules; none may lie within another."""
    spent, since, hooks = Counter(), {}, []

    def enters(name: str):
        def hook(*args):
            since[name] = now(device)

        return hook

    def leaves(name: str):
        def hook(*args):
            spent[name] += now(device) - since[name]

        return hook

    for name, parts in modules.items():
        for part in parts:
            hooks += [part.register_forward_pre_hook(enters(name)), part.register_forward_hook(leaves(name))]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()
