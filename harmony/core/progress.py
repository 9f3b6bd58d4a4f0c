"""The one line of progress: how much is done, at what rate, and when it ends."""

import time
from collections.abc import Callable
from functools import partial

SECOND, MINUTE = "second", "minute"
tell = partial(print, flush=True)  # so that a log shows at once how far it is


class Progress:
    """Says ``what: 3/10 pictures, 2.1 a second, 3 s left`` each time something is done.

    ``total`` counts what this process has to do; ``per``: the unit of the rate, ``second`` or ``minute``.
    """

    def __init__(
        self, what: str, total: int, unit: str, say: Callable[[str], None] = tell, per: str = SECOND, decimals: int = 1
    ):
        self.what, self.total, self.unit, self.say, self.per, self.decimals = what, total, unit, say, per, decimals
        self.done, self.start = 0, time.monotonic()

    def advance(self, count: int, detail: str = "", every: int = 1) -> None:
        """``count`` more are done; ``detail`` stands before the numbers. Says so each ``every`` and at the end."""
        before, self.done = self.done, self.done + count
        if self.done // every == before // every and self.done < self.total:
            return
        rate = self.done / max(time.monotonic() - self.start, 1e-9)
        left = (self.total - self.done) / rate if rate else 0
        shown = rate * (60 if self.per == MINUTE else 1)
        numbers = f"{self.done}/{self.total} {self.unit}, {shown:.{self.decimals}f} a {self.per}, {left:.0f} s left"
        self.say(f"{self.what}: {detail + ', ' if detail else ''}{numbers}")
