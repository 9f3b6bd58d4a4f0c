"""Files that are written whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harmony.core.files import replace_file, write_json, write_tensors


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


def test_text_needs_no_torch():
    """Guards the time of ``--help``: what writes text alone does not wait for a library of networks."""
    code = "import sys, harmony.core.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
