"""The runner of long work: in pieces that are kept, so that the same command goes on and several processes share it.

A piece is written whole or not at all (``core.files``), and where it lies says what it depends on. So a kill costs at
most one piece a process, and the same command goes on, with the same number of processes or another.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from harmony.core.errors import UserError
from harmony.core.progress import SECOND, Progress, tell

WAIT = 3600  # seconds without any new piece after which the other processes count as dead
Piece = TypeVar("Piece")


def make_pieces(
    what: str,
    sizes: Mapping[Piece, int],
    is_done: Callable[[Piece], bool],
    make: Callable[[Piece], object],
    unit: str = "items",
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = tell,
    per: str = SECOND,
    decimals: int = 1,
    every: int = 1,
    detail: Callable[[Piece], str] = lambda piece: "",
    through: Callable[[Callable, list], Iterable] = map,
) -> None:
    """Make this process's share of the pieces that are not done, with a line of progress after each.

    ``sizes``: piece -> its number of items, which the rate counts in ``unit``. Process ``rank`` of ``world`` takes each
    ``world``-th piece, whatever is done, so that processes need not talk to each other. ``every``: see ``Progress``;
    ``detail`` stands before its numbers. ``through`` applies ``make``: a pool's ``imap``, for pieces of equal size.
    """
    missing = [piece for piece in list(sizes)[rank::world] if not is_done(piece)]
    progress = Progress(what, sum(sizes[piece] for piece in missing), unit, say, per, decimals)
    for piece, _ in zip(missing, through(make, missing), strict=True):
        progress.advance(sizes[piece], detail(piece), every)


def await_files(files: Sequence[Path], say: Callable[[str], None] = tell) -> None:
    """Return when the pieces of the other processes are there too: all ``files``.

    UserError when none has come for ``WAIT`` seconds.
    """
    missing, since = {path for path in files if not path.exists()}, time.monotonic()
    if missing:
        say(f"waiting for {len(missing)} blocks of the other processes")
    while missing := {path for path in missing if not path.exists()}:
        count = len(missing)
        time.sleep(0.2)
        if sum(path.exists() for path in missing):
            since = time.monotonic()
        elif time.monotonic() - since > WAIT:
            raise UserError(f"{count} blocks never came from the other processes: start the same command again")
