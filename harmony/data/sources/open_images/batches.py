"""Batches of a long list, with a line of progress now and then."""

import time
from collections.abc import Callable, Iterator

from harmony.core.progress import tell

BATCH = 250  # samples for one write to the database


def batches(items: list, what: str, say: Callable[[str], None] = tell) -> Iterator[list]:
    """Batches of ``BATCH`` items; prints the count and the rate every few seconds and at the end."""
    start = last = time.monotonic()
    for first in range(0, len(items), BATCH):
        batch = items[first : first + BATCH]
        yield batch
        now, done = time.monotonic(), first + len(batch)
        if now - last > 5 or done == len(items):
            last = now
            say(f"{what}: {done}/{len(items)}, {done / max(now - start, 1e-9):.0f} a second")
