"""Memory of a training step, counted on the meta device and, where there is a GPU, measured.

The count covers weights, gradients, AdamW's two moments, and the activations that autograd keeps; the workspace of
kernels comes on top. Tensors of the meta device have shapes but no values.
"""

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from harmony.benchmarks.measure import measure_peak_memory
from harmony.benchmarks.train import Load, make_batch, make_our_step, prepare_task, to_device
from harmony.core.progress import tell
from harmony.models.backbone import Backbone

BATCHES = (1, 2, 4, 8, 16, 32, 64)
GPU_BATCHES = (1, 8, 64)  # the batch sizes that are measured on a GPU
MASTER = 8  # bytes a trained parameter: float32 weight and gradient
MOMENTS = 8  # bytes a trained parameter of AdamW's moments, on the device unless they are offloaded
OPTIONS = {  # that save memory on a small GPU
    "plain": {},
    "offload": {"offload": True},
    "checkpointing": {"checkpointing": True},
    "both": {"offload": True, "checkpointing": True},
}
GIB = 2**30


def count_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class FusedKernel(torch.autograd.Function):
    """Saves what a fused attention kernel saves for its gradient: query, key, value and output, no probabilities."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


class FusedAttention(TorchFunctionMode):
    """Gives the meta device, which has no fused attention kernel, the memory behavior of one."""

    def __torch_function__(
        self, function: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            return FusedKernel.apply(*args[:3])
        return function(*args, **(kwargs or {}))


def strip_values(backbone: Backbone) -> Backbone:
    """A backbone of the same architecture on the meta device, without values."""
    with torch.device("meta"):
        shapes = Backbone(backbone.path, "random", backbone.dtype, torch.device("meta"))
        for part in ("vae", "unet", "text_encoder"):
            getattr(shapes, part)
    return shapes


def count_activations(backbone: Backbone, batch: int, checkpointing: bool) -> float:
    """GiB of activations that autograd keeps in one step of a backbone from ``strip_values``, without the weights."""
    task = prepare_task(backbone, ("color",), Load(batch, 1, 1, checkpointing=checkpointing))
    torch.nn.Module.to(task.net, backbone.dtype)
    weights = {p.untyped_storage()._cdata for net in (task.net, backbone.unet) for p in net.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if (storage := x.untyped_storage())._cdata not in weights:
            storages[storage._cdata] = storage  # a reference, so that no address is used twice
        return x

    with backbone.device, FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        task.compute_errors(to_device(make_batch(backbone, batch), backbone.device))
    return sum(storage.nbytes() for storage in storages.values()) / GIB


def count_memory(backbone: Backbone) -> dict[str, dict[int, float]]:
    """Name of ``OPTIONS`` -> batch size -> GiB of a whole training step."""
    width = torch.finfo(backbone.dtype).bits // 8
    shapes = strip_values(backbone)
    net = prepare_task(shapes, ("color",), Load(1, 1, 1)).net
    size = count_parameters(net)
    copy = 0 if backbone.dtype == torch.float32 else width * size  # the rounded weights of mixed precision
    base = MASTER * size + copy + width * (count_parameters(shapes.unet) + count_parameters(shapes.text_encoder))
    base = (base + 4 * count_parameters(shapes.vae)) / GIB
    moments = MOMENTS * size / GIB
    activations = {
        checkpointing: [count_activations(shapes, batch, checkpointing) for batch in BATCHES]
        for checkpointing in (False, True)
    }
    return {
        name: {
            batch: base + a + (0 if options.get("offload") else moments)
            for batch, a in zip(BATCHES, activations[options.get("checkpointing", False)], strict=True)
        }
        for name, options in OPTIONS.items()
    }


def measure_step_peak(backbone: Backbone, batch: int, options: dict[str, bool]) -> float:
    """Peak GiB of two training steps; everything is freed on return."""
    step = make_our_step(prepare_task(backbone, ("color",), Load(batch, 1, 1, **options)), make_batch(backbone, batch))
    step(), step()
    return measure_peak_memory(backbone.device)


def measure_memory(backbone: Backbone, say: Callable[[str], None] = tell) -> dict[str, dict[int, float]]:
    """Peak GiB of training steps on the GPU, like ``count_memory``; sizes that do not fit are left out."""
    columns: dict[str, dict[int, float]] = {name: {} for name in OPTIONS}
    for name, options in OPTIONS.items():
        for batch in GPU_BATCHES:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                columns[name][batch] = measure_step_peak(backbone, batch, options)
            except torch.cuda.OutOfMemoryError:
                say(f"batch {batch}, {name}: does not fit")
                break
    return columns


def format_table(columns: dict[str, dict[int, float]]) -> str:
    """A Markdown table with a row for each batch size and GiB in the cells."""
    lines = ["| batch | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for batch in BATCHES:
        cells = (f"{column[batch]:.1f}" if batch in column else "-" for column in columns.values())
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bench_memory(backbone: Backbone, say: Callable[[str], None] = tell) -> dict[str, float]:
    """GiB by name (``counted_plain_8`` and so on); passes the table to ``say``."""
    columns = {f"counted, {name}": column for name, column in count_memory(backbone).items()}
    if backbone.device.type == "cuda":
        columns |= {f"measured, {name}": column for name, column in measure_memory(backbone, say).items()}
    say(f"GiB of a training step of one ControlNet on {backbone.name}, {str(backbone.dtype).removeprefix('torch.')}:")
    say(format_table(columns))
    return {f"{name.replace(', ', '_')}_{n}": v for name, column in columns.items() for n, v in column.items()}
