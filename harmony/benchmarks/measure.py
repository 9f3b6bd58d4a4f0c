"""Compares the speed of two functions in alternating blocks of calls, in one process on one machine."""

import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from harmony.core.progress import tell
from harmony.models.timing import now

SIDES = {"cpu": 2048, "cuda": 8192}  # of the matrices whose products give the device's peak rate
PRODUCTS = {"cpu": 4, "cuda": 50}  # a block
MIN_CALLS = 10  # of the reference in a block
WARMUP_CALLS = 2  # of each side, at most, before the first block


@dataclass(frozen=True)
class Rates:
    """Images a second in each block, of ours and of the reference; the n-th blocks of both ran one after the other."""

    ours: list[float]
    reference: list[float]

    def summarize(self, tflop: float | None = None, peak: float | None = None) -> dict[str, float]:
        """Median rates, and the median and range of the ratios of the pairs of blocks.

        ``tflop`` (of one image of ours) adds TFLOP/s; ``peak`` (TFLOP/s of the device) adds the share of it.
        """
        ratios = [a / b for a, b in zip(self.ours, self.reference, strict=True)]
        figures = {"ours": statistics.median(self.ours), "reference": statistics.median(self.reference)}
        figures |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        if tflop is not None:
            figures |= {"tflops": tflop * figures["ours"]}
            figures |= {"share_of_peak": figures["tflops"] / peak} if peak else {}
        return figures


def measure_rate(step: Callable[[], object], steps: int, images: int, device: torch.device) -> float:
    """Images a second over ``steps`` calls of ``images`` each."""
    start = now(device)
    for _ in range(steps):
        step()
    return steps * images / (now(device) - start)


def alternate(
    ours: Callable[[], object],
    reference: Callable[[], object],
    images: int,
    device: torch.device,
    steps: int,
    blocks: int,
    say: Callable[[str], None] = tell,
) -> Rates:
    """Rates of both over ``blocks`` pairs of blocks of ``steps`` calls, after a few calls for compilation and caches.

    The reference, which is slower, makes only a quarter of the calls of a long block, but at least ``MIN_CALLS``.
    """
    calls = {ours: steps, reference: min(steps, max(MIN_CALLS, steps // 4))}
    for step in (ours, reference):
        measure_rate(step, min(WARMUP_CALLS, steps), images, device)
    rates = Rates([], [])
    for n in range(blocks):
        for step, series in ((ours, rates.ours), (reference, rates.reference)):
            series.append(measure_rate(step, calls[step], images, device))
        ratio = rates.ours[-1] / rates.reference[-1]
        say(f"block {n + 1}/{blocks}: {rates.ours[-1]:.3g} against {rates.reference[-1]:.3g} a second, {ratio:.2f} x")
    return rates


def measure_matmul_rate(device: torch.device, dtype: torch.dtype, blocks: int = 5) -> float:
    """The device's peak rate: TFLOP/s of the fastest of a few blocks of square matrix products."""
    side, count = SIDES[device.type], PRODUCTS[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    rates = [measure_rate(lambda: torch.mm(a, b, out=out), count, 1, device) for _ in range(blocks)]
    return max(rates) * 2 * side**3 / 1e12


def count_tflop(step: Callable[[], object], images: int) -> float:
    """TFLOP of one call, per image; a multiplication with its addition counts as two operations."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / images / 1e12


def measure_peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: of tensors on a GPU since its statistics were reset, of this whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
