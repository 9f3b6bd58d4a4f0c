"""Progress lines: the count so far, the rate and the time that remains."""

import time
from collections.abc import Callable
from functools import partial

SECOND, MINUTE = "second", "minute"
tell = partial(print, flush=True)  # flushed, so that a log is always up to date


class Progress:
    """Print lines such as ``what: 3/10 pictures, 2.1 a second, 3 s left``.

    ``total`` is the number of items of this process. ``per`` is the unit of the rate, ``second`` or ``minute``.
    """

    def __init__(
        self, what: str, total: int, unit: str, say: Callable[[str], None] = tell, per: str = SECOND, decimals: int = 1
    ):
        self.what, self.total, self.unit, self.say, self.per, self.decimals = what, total, unit, say, per, decimals
        self.count, self.start = 0, time.monotonic()

    def advance(self, count: int, detail: str = "", every: int = 1) -> None:
        """Add ``count`` items; print a line every ``every`` items and at the end, ``detail`` before the numbers."""
        previous_count, self.count = self.count, self.count + count
        if self.count // every == previous_count // every and self.count < self.total:
            return
        rate = self.count / max(time.monotonic() - self.start, 1e-9)  # items a second
        seconds = (self.total - self.count) / rate if rate else 0
        rate *= 60 if self.per == MINUTE else 1
        numbers = f"{self.count}/{self.total} {self.unit}, {rate:.{self.decimals}f} a {self.per}, {seconds:.0f} s left"
        self.say(f"{self.what}: {detail + ', ' if detail else ''}{numbers}")
