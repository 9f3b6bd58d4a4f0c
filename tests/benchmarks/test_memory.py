"""Memory of a training step, counted where nothing is computed."""

import torch

from harmony.benchmarks.memory import BATCHES, OPTIONS, bench_memory, kept, numel, shapes_of
from harmony.benchmarks.train import Load, cached_batch, ready
from harmony.models.backbone import Kit
from harmony.models.controlnet import from_unet


def test_what_autograd_keeps_is_counted(random_kit):
    """Guards the count against a real step: the bytes kept of activations on the CPU, weights left out."""
    kit = Kit(str(random_kit))
    task, batch, found = ready(kit, ("color",), Load(4, 1, 1)), cached_batch(kit, 4), {}
    weights = {p.untyped_storage().data_ptr() for net in (task.net, kit.unet) for p in net.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes(), x  # alive, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        task.errors(batch)
    real = sum(size for size, _ in found.values()) / 2**30
    assert abs(kept(shapes_of(kit), 4, False) / real - 1) < 0.02


def test_the_table(random_kit):
    """Guards the figures: more with every batch, less with each option, least with both."""
    said = []
    figures = bench_memory(Kit(str(random_kit)), said.append)
    plain, offload, again, both = ([figures[f"counted_{name}_{n}"] for n in BATCHES] for name in OPTIONS)
    assert plain == sorted(plain) and all(a > b > 0 for a, b in zip(plain[-3:], again[-3:], strict=True))
    moments = {round((a - b) * 2**30) for a, b in [*zip(plain, offload, strict=True), *zip(again, both, strict=True)]}
    assert moments == {8 * numel(from_unet(Kit(str(random_kit)).unet, 4))}
    assert "| 64 |" in said[-1]
