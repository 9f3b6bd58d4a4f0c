"""Weight files, read and checked: what is wrong with one ends in a line that names the file and the tensor."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from harmony.core.errors import UserError

CONSTANTS = ("position_ids", "num_batches_tracked")  # tensors of whole numbers that networks may have
RESTORE = "restore it from a copy"
LOADING = threading.Lock()  # transformers replaces a method of its classes while it loads: two threads would lose it


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file. UserError for a damaged file, and see ``check_tensors``."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({str(error).splitlines()[0]}): {RESTORE}") from None
    check_tensors(tensors, str(file))
    return tensors


def check_tensors(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """UserError for a tensor of ``source`` that is no floating point numbers, or holds NaN or infinite ones."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            if not name.endswith(CONSTANTS):
                kind = str(tensor.dtype).removeprefix("torch.")
                raise UserError(f"{source}: tensor {name} is {kind}, give weights of float16, bfloat16 or float32")
        elif not tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite():
            raise UserError(f"{source}: tensor {name} holds NaN or infinite numbers: {RESTORE}")


def load_network(cls: type, folder: str | os.PathLike, **options: Any) -> torch.nn.Module:
    """A network of diffusers or transformers from a folder or hub id, by ``cls.from_pretrained``.

    UserError for damaged weights and for those that do not fit its config.json.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    transformers.utils.logging.disable_progress_bar()
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()  # no warning about tensors that another class would read
    files = sorted(Path(folder).glob("*.safetensors"))
    for file in files:
        read_weights(file)
    with LOADING:
        network, facts = cls.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    source = files[0] if len(files) == 1 else folder
    for name in sorted(facts["missing_keys"]):
        raise UserError(f"{source} lacks the tensor {name}, which config.json beside it asks for: {RESTORE}")
    for name, shape, expected_shape in facts["mismatched_keys"]:
        refuse_shape(source, name, shape, expected_shape)
    return network


def fill_network(network: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Give ``network`` the ``tensors`` of ``source``. UserError where they are not exactly its own."""
    shapes, expected_shapes = ({n: t.shape for n, t in group.items()} for group in (tensors, network.state_dict()))
    for name in {**expected_shapes, **shapes}:
        if shapes.get(name) != expected_shapes.get(name):
            refuse_shape(source, name, shapes.get(name), expected_shapes.get(name))
    network.load_state_dict(tensors)


def refuse_shape(source: str | os.PathLike, name: str, shape: Any, expected_shape: Any) -> None:
    """Raise UserError for a tensor that has another shape than its network, or that only one of them has (None)."""
    texts = ["none" if s is None else "x".join(map(str, s)) or "a number" for s in (shape, expected_shape)]
    raise UserError(f"{source} does not fit its configuration: tensor {name} is {texts[0]}, expected {texts[1]}")
