"""Files that are written whole or not at all."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from harmony.core.errors import UserError
from harmony.core.files import HOST, remove_leftovers, replace_file, write_json, write_tensors
from harmony.pixels.images import write_image
from harmony.training.callbacks import AtomicCheckpoints


def test_tensors_of_any_layout_come_back(tmp_path):
    """Guards what safetensors refuses: channels last, transposed, a slice; and the tensors that training holds."""
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    tensors = {
        "last": x.to(memory_format=torch.channels_last),
        "turned": x[0, 0].T,
        "slice": x[..., 1],
        "trained": torch.nn.Parameter(x.bfloat16()),
    }
    write_tensors(tmp_path / "new" / "x.safetensors", tensors, {"format": "pt"})
    found = load_file(tmp_path / "new" / "x.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    write_tensors(
        tmp_path / "plain.safetensors", {n: v.detach().contiguous() for n, v in tensors.items()}, {"format": "pt"}
    )
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "new" / "x.safetensors").read_bytes()


def test_a_failure_leaves_what_was_there(tmp_path):
    write_json(tmp_path / "x", 1)
    with pytest.raises(RuntimeError), replace_file(tmp_path / "x") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "1\n")]


def write_and_die(path: Path, how: str) -> None:
    """A process that is killed while it writes ``path``."""
    code = "import os, pathlib, sys; from harmony.core import files\n"
    code += (
        f"with files.{how}(pathlib.Path(sys.argv[1])) as temp: temp.exists() or temp.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[2]).returncode == 9


@pytest.mark.parametrize("how", ["replace_file", "replace_folder", "make_scratch"])
def test_the_next_process_removes_what_a_killed_one_left(how, tmp_path):
    """Guards the folder: half-written files and folders of processes that are no more go, those of others stay."""
    write_and_die(tmp_path / "x[1].csv", how)
    (left,) = tmp_path.iterdir()
    alive, stranger = (
        tmp_path / f".x.{host}-{process}.partial" for host, process in ((HOST, os.getppid()), ("0" * 8, 99999999))
    )
    for path in (alive, stranger, tmp_path / ".mine.partial"):
        path.write_text("")
    remove_leftovers.cache_clear()
    write_json(tmp_path / "y", 1)
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, stranger.name, ".mine.partial", "y"}
    assert left.name.startswith(f".x[1].csv.{HOST}-")


NOISE = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a disk of 64 KiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can make a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_json(file, "x" * 200_000),
        lambda file: write_tensors(file, {"x": torch.zeros(100_000)}),
        lambda file: write_image(
            file.with_suffix(".png"), np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
        ),
        lambda file: AtomicCheckpoints().save_checkpoint({"x": torch.zeros(100_000)}, file),
    ],
    ids=["text", "tensors", "picture", "checkpoint"],
)
def test_a_full_disk_is_named_and_left_clean(full_disk, write):
    """Guards each writer on a real full disk: one line that names the folder, and nothing half-written."""
    with pytest.raises(UserError, match=f"{re.escape(str(full_disk))}") as full:
        write(full_disk / "runs" / "x")
    assert "\n" not in str(full.value) and "free some" in str(full.value)
    assert not [path for path in full_disk.rglob("*") if path.is_file()]


def test_text_needs_no_torch():
    """Guards the time of ``--help``: what writes text alone does not wait for a library of networks."""
    code = "import sys, harmony.core.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
