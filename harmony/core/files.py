"""Small files, written whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGE = Path(__file__).resolve().parents[1]


def bundled(folder: str) -> Path:
    """A folder of this project, such as ``experiments``: beside the package in a clone, inside it in a wheel."""
    return PACKAGE / folder if (PACKAGE / folder).is_dir() else PACKAGE.parent / folder


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Where to write what takes the place of ``path`` when the block ends, and is gone when it fails.

    The folder is made if needed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into, empty at first, that takes the place of ``path`` when the block ends."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically; its folder is made if needed."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON atomically, indented, paths as strings."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, "torch.Tensor"], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; the tensors may lie on any device and in any memory format."""
    from safetensors.torch import save_file  # which loads torch: what writes text alone need not wait for it

    with atomic(path) as partial:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, partial, metadata)
