"""Stamps of a dataset's files: whether one was added, removed or written since the dataset was prepared.

A stamp is a hash of the names, sizes and times of all files, which are not opened: a million take some seconds.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from harmony.core.errors import UserError
from harmony.core.files import write_json
from harmony.core.foreign import read_json

FILE = "stamps.json"  # beside the manifest


def write_stamps(folder: Path, places: Iterable[Path]) -> None:
    """Write the stamp of ``places``, files and folders that may be missing yet, beside the manifest in ``folder``."""
    names = [os.path.abspath(place) for place in places]
    write_json(folder / FILE, {"places": names, "stamp": make_stamp(names)})


def has_changed(folder: Path) -> bool:
    """Whether a file has changed since ``write_stamps``, or nothing is known of it."""
    try:
        record = read_json(folder / FILE)
        return make_stamp(record["places"]) != record["stamp"]
    except (UserError, KeyError, TypeError):
        return True


def make_stamp(places: Iterable[str]) -> str:
    """Hash the names, sizes and times of all files in ``places``."""
    digest = hashlib.sha256()
    for place in places:
        for path, size, time in list_files(place):
            digest.update(f"{path}\0{size}\0{time}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def list_files(path: str, parents: frozenset[tuple[int, int]] = frozenset()) -> Iterator[tuple[str, int, int]]:
    """Yield (path, bytes, time in ns) of a file, or of all files in a folder, hidden ones left out.

    ``parents``: the folders that lead to it, so that a link to one of them is not followed.
    """
    try:
        facts = os.stat(path)
        names = sorted(os.listdir(path)) if stat.S_ISDIR(facts.st_mode) else None
    except OSError:  # a broken link, or a folder that may not be read
        return
    if names is None:
        yield path, facts.st_size, facts.st_mtime_ns
    elif (place := (facts.st_dev, facts.st_ino)) not in parents:
        parents |= {place}
        for name in names:
            if not name.startswith("."):
                yield from list_files(f"{path}/{name}", parents)
