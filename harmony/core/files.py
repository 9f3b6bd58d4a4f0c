"""Atomic writing: a file or folder is written completely or not at all."""

import errno
import json
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmony.core.errors import UserError

if TYPE_CHECKING:
    import torch

PACKAGE = Path(__file__).resolve().parents[1]
HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"  # in temporary names: a process id says nothing elsewhere
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, quota, limit of a file's size


def bundled(folder: str) -> Path:
    """A folder of this project, such as ``experiments``: beside the package in a clone, inside it in a wheel."""
    return PACKAGE / folder if (PACKAGE / folder).is_dir() else PACKAGE.parent / folder


def make_temp_path(path: Path) -> Path:
    """The hidden path that this process writes to before ``path`` is replaced; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}.partial")


@cache
def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this machine left half-written in ``folder``, once a process."""
    for entry in os.scandir(folder):
        match = re.fullmatch(rf"\..*\.{HOST}-(\d+)\.partial", entry.name)
        if match and not is_running(int(match[1])):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether a process with this id runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


@contextmanager
def name_full_folder(folder: Path) -> Iterator[None]:
    """Turn the error of a write into ``folder`` into a UserError that names it, where the disk is full."""
    try:
        yield
    except Exception as error:  # safetensors, torch and Pillow wrap the system's error, or swallow it
        known = isinstance(error, OSError) and error.errno in FULL
        if not known and not any(f"os error {code}" in str(error) for code in FULL):
            raise
        raise UserError(f"disk full: cannot write into {folder}; free some space, the same command goes on") from error


@contextmanager
def replace_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path that replaces the file ``path`` when the block ends; it is deleted if the block fails.

    The parent folder is created if needed. UserError where the disk is full.
    """
    path = Path(path)
    with name_full_folder(path.parent):
        temp_path = make_temp_path(path)
        try:
            yield temp_path
            os.replace(temp_path, path)
        finally:
            temp_path.unlink(missing_ok=True)


@contextmanager
def make_scratch(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``, which is removed when the block ends."""
    with name_full_folder(path.parent):
        folder = make_temp_path(path)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replace_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces the folder ``path`` when the block ends."""
    path = Path(path)
    with make_scratch(path) as folder:
        yield folder
        shutil.rmtree(path, ignore_errors=True)
        os.replace(folder, path)


def list_missing(folder: Path) -> list[Path]:
    """``folder`` and those above it that do not exist."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_unused(folders: Sequence[Path], *marks: str) -> None:
    """Remove what ``list_missing`` gave and a command has made since, where it was refused before it wrote any file.

    The first may hold empty folders and the files ``marks``, those above it nothing.
    """
    for folder in folders[:1]:
        if all(path.is_dir() or path.name in marks for path in folder.rglob("*")):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in folders[1:]:
        with suppress(OSError):  # others write there
            folder.rmdir()


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
