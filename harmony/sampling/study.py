"""F3. Studies: several methods on one bench, block by block, resumable, over any number of processes.

A block is ``BLOCK`` consecutive pictures of one method. It is computed as a whole and stored in one file, so that a
table is the same whether one process made it, several, or one that was killed and started again.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from harmony.composites import copy_paste, poisson, reinhard
from harmony.errors import UserError
from harmony.models.kit import Kit
from harmony.sampling.benchmark import Bench, reconstruct
from harmony.sampling.harmonize import Branch, Settings

BLOCK = 16
WAIT = 3600  # seconds without any new block after which the other processes count as dead
Fill = Callable[[Bench, Sequence[int]], list[np.ndarray]]  # items of a bench, their indices -> raw outputs


@dataclass(frozen=True)
class Method:
    """A row of a table: ``name``, and what makes the outputs."""

    name: str
    fill: Fill


def _reinhard(background: np.ndarray, instance: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return copy_paste(background, reinhard(instance, mask, background), mask)


BASELINES = {"copy_paste": copy_paste, "reinhard": _reinhard, "poisson": poisson}  # (background, instance, mask)


def baseline(kind: str, name: str | None = None) -> Method:
    """A composite without a network, named as its kind unless ``name`` is given. UserError for an unknown kind."""
    if kind not in BASELINES:
        raise UserError(f"baseline={kind}: choose one of {', '.join(BASELINES)}")
    make = BASELINES[kind]

    def fill(bench: Bench, indices: Sequence[int]) -> list[np.ndarray]:
        masks = [e.mask for e in bench.examples]
        return [make(*item) for item in zip(bench.seen(), bench.given(), masks, strict=True)]

    return Method(name or kind, fill)


def diffusion(name: str, kit: Kit, branches: Sequence[Branch], settings: Settings) -> Method:
    """Inpainting with ControlNets; without any (or all of weight 0) plain inpainting by the caption."""
    settings = replace(settings, batch=BLOCK)
    return Method(name, lambda bench, indices: reconstruct(kit, bench, branches, settings, indices))


def weighted(branches: Mapping[str, Branch], weights: Mapping[str, float]) -> list[Branch]:
    """The named branches, each with its weight."""
    return [replace(branches[name], weight=float(weight)) for name, weight in weights.items()]


def blocks(count: int) -> list[range]:
    return [range(i, min(i + BLOCK, count)) for i in range(0, count, BLOCK)]


def block_file(folder: Path, method: Method, block: range) -> Path:
    return folder / method.name / f"{block.start:05d}.npy"


def run(
    bench: Bench,
    methods: Sequence[Method],
    folder: Path,
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = print,
) -> None:
    """Compute this process's share of the blocks that are not in ``folder`` yet, then wait for those of the others."""
    jobs = [(method, block) for method in methods for block in blocks(len(bench))]
    mine = [job for job in jobs[rank::world] if not block_file(folder, *job).exists()]
    began, done, total = time.monotonic(), 0, sum(len(block) for _, block in mine)
    for method, block in mine:
        store(block_file(folder, method, block), method.fill(bench.part(block), list(block)))
        done += len(block)
        rate = done / (time.monotonic() - began)
        left = (total - done) / rate
        say(f"{bench.name}: {method.name}, {done}/{total} pictures, {rate:.1f} a second, {left:.0f} s left")
    await_blocks([block_file(folder, *job) for job in jobs])


def store(path: Path, outputs: list[np.ndarray]) -> None:
    """Write a block, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        np.save(file, np.stack(outputs))
    os.replace(partial, path)


def await_blocks(files: Sequence[Path]) -> None:
    """Return when all ``files`` are there. UserError when none has come for ``WAIT`` seconds."""
    missing, since = set(files), time.monotonic()
    while missing := {path for path in missing if not path.exists()}:
        left = len(missing)
        time.sleep(0.2)
        if sum(path.exists() for path in missing):
            since = time.monotonic()
        elif time.monotonic() - since > WAIT:
            raise UserError(f"{left} blocks never came from the other processes: start the same command again")


def outputs(bench: Bench, method: Method, folder: Path) -> list[np.ndarray]:
    """The stored outputs of a method, uint8 R x R x 3, in the order of the bench."""
    return [image for block in blocks(len(bench)) for image in np.load(block_file(folder, method, block))]
