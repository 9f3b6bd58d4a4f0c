"""Measuring two ways of one thing beside each other: in one process, in alternating blocks, on one machine."""

import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from harmony.models.timing import now

SIDES = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product says what the device can do
PRODUCTS = {"cpu": 4, "cuda": 50}  # in a block
ENOUGH = 10  # calls of the reference in a block
WARM = 2  # steps of each, at most, before anything is measured


@dataclass(frozen=True)
class Rates:
    """Images a second of each block of ours and of the reference; the n-th of both were measured one after another."""

    ours: list[float]
    reference: list[float]

    def figures(self, tflop: float | None = None, peak: float | None = None) -> dict[str, float]:
        """Medians, their ratio and its range over the pairs of blocks; with the TFLOP of one image of ours and the
        device's measured ``peak`` in TFLOP/s also TFLOP/s and the share of the peak.
        """
        ratios = [a / b for a, b in zip(self.ours, self.reference, strict=True)]
        found = {"ours": statistics.median(self.ours), "reference": statistics.median(self.reference)}
        found |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        if tflop is not None:
            found |= {"tflops": tflop * found["ours"]}
            found |= {"share_of_peak": found["tflops"] / peak} if peak else {}
        return found


def rate(step: Callable[[], object], steps: int, images: int, device: torch.device) -> float:
    """Images a second over ``steps`` calls of ``images`` each."""
    began = now(device)
    for _ in range(steps):
        step()
    return steps * images / (now(device) - began)


def alternate(
    ours: Callable[[], object],
    reference: Callable[[], object],
    images: int,
    device: torch.device,
    steps: int,
    blocks: int,
    say: Callable[[str], None] = print,
) -> Rates:
    """``blocks`` pairs of blocks of ``steps`` calls each, after a few calls that do not count (compilation, caches).

    Of long blocks the reference makes a quarter, at least ``ENOUGH`` calls: rates are compared, and it is the slow one.
    """
    calls = {ours: steps, reference: min(steps, max(ENOUGH, steps // 4))}
    for step in (ours, reference):
        rate(step, min(WARM, steps), images, device)
    found = Rates([], [])
    for n in range(blocks):
        for step, rates in ((ours, found.ours), (reference, found.reference)):
            rates.append(rate(step, calls[step], images, device))
        ratio = found.ours[-1] / found.reference[-1]
        say(f"block {n + 1}/{blocks}: {found.ours[-1]:.3g} against {found.reference[-1]:.3g} a second, {ratio:.2f} x")
    return found


def matmul_rate(device: torch.device, dtype: torch.dtype, blocks: int = 5) -> float:
    """TFLOP/s of the fastest of some blocks of square matrix products: what this device can do."""
    side, count = SIDES[device.type], PRODUCTS[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    rates = [rate(lambda: torch.mm(a, b, out=out), count, 1, device) for _ in range(blocks)]
    return max(rates) * 2 * side**3 / 1e12


def tflop(step: Callable[[], object], images: int) -> float:
    """Floating-point operations of one call, per image, in 10^12; a multiplication with its addition counts as two."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / images / 1e12


def peak_memory(device: torch.device) -> float:
    """GiB: the most that tensors took on a GPU since its count was reset, or that this process ever took on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
