"""Batches of a long list, with progress lines."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from harmony.core.progress import tell

BATCH = 250  # samples in one write to the database
Item, Result = TypeVar("Item"), TypeVar("Result")


def batches(items: list, what: str, say: Callable[[str], None] = tell) -> Iterator[list]:
    """Yield batches of ``BATCH`` items; print the count and the rate every few seconds and at the end."""
    start = last_time = time.monotonic()
    for first in range(0, len(items), BATCH):
        batch = items[first : first + BATCH]
        yield batch
        now, count = time.monotonic(), first + len(batch)
        if now - last_time > 5 or count == len(items):
            last_time = now
            say(f"{what}: {count}/{len(items)}, {count / max(now - start, 1e-9):.0f} a second")


def map_in_threads(function: Callable[[Item], Result], items: list[Item], what: str) -> list[Result]:
    """The results of ``function`` on the items, in their order; an interruption waits for one batch at most."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [result for batch in batches(items, what) for result in pool.map(function, batch)]
