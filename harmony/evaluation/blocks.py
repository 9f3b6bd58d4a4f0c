"""Outputs in blocks: made once, kept in files, shared by any number of processes.

A block is ``BLOCK`` consecutive pictures of one method. It is computed as a whole and stored in one file, so that a
table is the same whether one process made it, several, or one that was killed and started again. Where a block lies
says what it depends on: the fingerprints of its method and of its eval set. Equal rows share their outputs.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from harmony.core.errors import UserError
from harmony.core.files import replace_file
from harmony.core.progress import Progress, tell
from harmony.evaluation.eval_sets import EvalSet
from harmony.methods.method import Method, fingerprint, seeds_of

BLOCK = 16
WAIT = 3600  # seconds without any new block after which the other processes count as dead


def blocks(count: int) -> list[range]:
    return [range(i, min(i + BLOCK, count)) for i in range(0, count, BLOCK)]


def folder_of(folder: Path, items: EvalSet, method: Method, seed: int) -> Path:
    """Where the outputs of a method on an eval set lie."""
    return folder / "outputs" / method.fingerprint[:16] / fingerprint(items.fingerprint, seed)[:16]


def block_file(place: Path, block: range) -> Path:
    return place / f"{block.start:05d}.npy"


def fill_blocks(
    items: EvalSet,
    rows: dict[str, Method],
    folder: Path,
    seed: int,
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = tell,
) -> None:
    """Compute this process's share of the blocks that are not in ``folder`` yet, then wait for those of the others."""
    jobs = {}  # of equal rows the first one works
    for name, method in rows.items():
        place = folder_of(folder, items, method, seed)
        for block in blocks(len(items)):
            jobs.setdefault(block_file(place, block), (name, method, block))
    own = {file: job for file, job in list(jobs.items())[rank::world] if not file.exists()}
    progress = Progress(items.name, sum(len(block) for _, _, block in own.values()), "pictures", say)
    for file, (name, method, block) in own.items():
        composites = [items.composites[i] for i in block]
        store(file, method.fill(composites, seeds_of(seed, block)))
        progress.advance(len(block), name)
    await_files(list(jobs), say)


def store(path: Path, outputs: list[np.ndarray]) -> None:
    """Write a block, whole or not at all."""
    with replace_file(path) as partial, open(partial, "wb") as file:
        np.save(file, np.stack(outputs))


def await_files(files: Sequence[Path], say: Callable[[str], None] = tell) -> None:
    """Return when all ``files`` are there. UserError when none has come for ``WAIT`` seconds."""
    missing, since = {path for path in files if not path.exists()}, time.monotonic()
    if missing:
        say(f"waiting for {len(missing)} blocks of the other processes")
    while missing := {path for path in missing if not path.exists()}:
        left = len(missing)
        time.sleep(0.2)
        if sum(path.exists() for path in missing):
            since = time.monotonic()
        elif time.monotonic() - since > WAIT:
            raise UserError(f"{left} blocks never came from the other processes: start the same command again")


def outputs_of(items: EvalSet, method: Method, folder: Path, seed: int) -> list[np.ndarray]:
    """The stored outputs of a method, uint8 R x R x 3, in the order of the set."""
    place = folder_of(folder, items, method, seed)
    return [image for block in blocks(len(items)) for image in np.load(block_file(place, block))]
