"""How much memory a training step needs, counted without a device and, where there is a GPU, measured.

Counted on the meta device, whose tensors have shapes and no values: weights, gradients, AdamW's two moments, and what
autograd keeps of the activations. Kernels' workspace comes on top.
"""

import gc

import torch
from torch.overrides import TorchFunctionMode

from harmony.benchmarks.measure import peak_memory
from harmony.benchmarks.train import Load, cached_batch, our_step, ready, to_device
from harmony.models.backbone import Backbone

BATCHES = (1, 2, 4, 8, 16, 32, 64)
MEASURED = (1, 8, 64)  # of them, where there is a GPU
MASTER = 8  # bytes a trained parameter on the device: float32 weight and gradient
MOMENTS = 8  # AdamW's, there too unless they are offloaded
OPTIONS = {  # what may be switched on for a small card
    "plain": {},
    "offload": {"offload": True},
    "checkpointing": {"checkpointing": True},
    "both": {"offload": True, "checkpointing": True},
}
GIB = 2**30


def numel(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class Fused(torch.autograd.Function):
    """What a fused attention kernel keeps for its gradient: query, key, value and output, no probabilities."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


class FusedAttention(TorchFunctionMode):
    """On the meta device, which has no fused kernel, attention keeps what it keeps elsewhere."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            return Fused.apply(*args[:3])
        return function(*args, **(kwargs or {}))


def shapes_of(backbone: Backbone) -> Backbone:
    """The same architecture without values, on the meta device."""
    with torch.device("meta"):
        shapes = Backbone(backbone.path, "random", backbone.dtype, torch.device("meta"))
        for part in ("vae", "unet", "text_encoder"):
            getattr(shapes, part)
    return shapes


def kept(backbone: Backbone, batch: int, checkpointing: bool) -> float:
    """GiB of activations that autograd keeps in one step on ``shapes_of`` a backbone, in its dtype; weights left
    out.
    """
    task = ready(backbone, ("color",), Load(batch, 1, 1, checkpointing=checkpointing))
    torch.nn.Module.to(task.net, backbone.dtype)
    weights = {p.untyped_storage()._cdata for net in (task.net, backbone.unet) for p in net.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if (storage := x.untyped_storage())._cdata not in weights:
            found[storage._cdata] = storage  # held, so that no address is used twice
        return x

    with backbone.device, FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        task.errors(to_device(cached_batch(backbone, batch), backbone.device))
    return sum(storage.nbytes() for storage in found.values()) / GIB


def counted(backbone: Backbone) -> dict[str, dict[int, float]]:
    """Name of ``OPTIONS`` -> batch size -> GiB of a whole training step."""
    width = torch.finfo(backbone.dtype).bits // 8
    shapes = shapes_of(backbone)
    net = ready(shapes, ("color",), Load(1, 1, 1)).net
    rounded = 0 if backbone.dtype == torch.float32 else width * numel(net)  # what mixed precision computes with
    fixed = MASTER * numel(net) + rounded + width * (numel(shapes.unet) + numel(shapes.text_encoder))
    fixed = (fixed + 4 * numel(shapes.vae)) / GIB
    moments = MOMENTS * numel(net) / GIB
    activations = {again: [kept(shapes, batch, again) for batch in BATCHES] for again in (False, True)}
    return {
        name: {
            batch: fixed + a + (0 if options.get("offload") else moments)
            for batch, a in zip(BATCHES, activations[options.get("checkpointing", False)], strict=True)
        }
        for name, options in OPTIONS.items()
    }


def step_peak(backbone: Backbone, batch: int, options: dict[str, bool]) -> float:
    """GiB that two steps took at most; what they were made of is gone when it returns."""
    step = our_step(ready(backbone, ("color",), Load(batch, 1, 1, **options)), cached_batch(backbone, batch))
    step(), step()
    return peak_memory(backbone.device)


def measured(backbone: Backbone, say=print) -> dict[str, dict[int, float]]:
    """Some of the same on the GPU, by its allocator; sizes that do not fit are left out."""
    found: dict[str, dict[int, float]] = {name: {} for name in OPTIONS}
    for name, options in OPTIONS.items():
        for batch in MEASURED:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                found[name][batch] = step_peak(backbone, batch, options)
            except torch.cuda.OutOfMemoryError:
                say(f"batch {batch}, {name}: does not fit")
                break
    return found


def table(columns: dict[str, dict[int, float]]) -> str:
    """Markdown: batch sizes down, GiB across."""
    lines = ["| batch | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for batch in BATCHES:
        cells = (f"{column[batch]:.1f}" if batch in column else "-" for column in columns.values())
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bench_memory(backbone: Backbone, say=print) -> dict[str, float]:
    """Figures ``counted_plain_8`` and so on in GiB; says the table."""
    columns = {f"counted, {name}": column for name, column in counted(backbone).items()}
    if backbone.device.type == "cuda":
        columns |= {f"measured, {name}": column for name, column in measured(backbone, say).items()}
    say(f"GiB of a training step of one ControlNet on {backbone.name}, {str(backbone.dtype).removeprefix('torch.')}:")
    say(table(columns))
    return {f"{name.replace(', ', '_')}_{n}": v for name, column in columns.items() for n, v in column.items()}
