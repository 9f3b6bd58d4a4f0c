"""Atomic writing: a file or folder is written completely or not at all."""

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
def replace_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path that replaces the file ``path`` when the block ends; it is deleted if the block fails.

    The parent folder is created if needed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temp_path
        os.replace(temp_path, path)
    finally:
        temp_path.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces the folder ``path`` when the block ends."""
    path = Path(path)
    temp_folder = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(temp_folder, ignore_errors=True)
    temp_folder.mkdir(parents=True)
    try:
        yield temp_folder
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temp_folder, path)
    finally:
        shutil.rmtree(temp_folder, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically; its folder is created if needed."""
    with replace_file(path) as temp_path:
        temp_path.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON atomically, indented, paths as strings."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, "torch.Tensor"], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; the tensors may be on any device and in any memory format."""
    from safetensors.torch import save_file  # imported here because it loads torch, which writing text does not need

    with replace_file(path) as temp_path:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temp_path, metadata)
