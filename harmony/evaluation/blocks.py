"""Outputs in blocks: made once, kept in files, shared by any number of processes.

A block is ``BLOCK`` consecutive pictures of one method. It is computed as a whole and stored in one file, so that a
table is the same whether one process made it, several, or one that was killed and started again. Where a block lies
says what it depends on: the fingerprints of its method and of its eval set. Equal rows share their outputs.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from harmony.core.files import replace_file
from harmony.core.pieces import await_files, make_pieces
from harmony.core.progress import tell
from harmony.evaluation.eval_sets import EvalSet
from harmony.methods.method import Method, fingerprint, make_seeds

BLOCK = 16


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
    jobs = {}  # equal rows share their blocks; the first one makes them
    for name, method in rows.items():
        place = folder_of(folder, items, method, seed)
        for block in blocks(len(items)):
            jobs.setdefault(block_file(place, block), (name, method, block))

    def make(file: Path) -> None:
        _, method, block = jobs[file]
        store(file, method.fill([items.composites[i] for i in block], make_seeds(seed, block)))

    sizes = {file: len(block) for file, (_, _, block) in jobs.items()}
    names = {file: name for file, (name, _, _) in jobs.items()}
    make_pieces(items.name, sizes, Path.exists, make, "pictures", rank, world, say, detail=names.get)
    await_files(list(jobs), say)


def store(path: Path, outputs: list[np.ndarray]) -> None:
    """Write a block, whole or not at all."""
    with replace_file(path) as partial, open(partial, "wb") as file:
        np.save(file, np.stack(outputs))


def outputs_of(items: EvalSet, method: Method, folder: Path, seed: int) -> list[np.ndarray]:
    """The stored outputs of a method, uint8 R x R x 3, in the order of the set."""
    place = folder_of(folder, items, method, seed)
    return [image for block in blocks(len(items)) for image in np.load(block_file(place, block))]
