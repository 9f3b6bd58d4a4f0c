"""Memory of a training step, counted where nothing is computed."""

import torch

from harmony.benchmarks.memory import BATCHES, OPTIONS, bench_memory, count_activations, count_parameters, strip_values
from harmony.benchmarks.train import Load, make_batch, prepare_task
from harmony.models.backbone import Backbone
from harmony.models.controlnet import from_unet


def test_what_autograd_keeps_is_counted(random_backbone):
    """Guards the count against a real step: the bytes kept of activations on the CPU, weights left out."""
    backbone = Backbone(str(random_backbone))
    task, batch, found = prepare_task(backbone, ("color",), Load(4, 1, 1)), make_batch(backbone, 4), {}
    weights = {p.untyped_storage().data_ptr() for net in (task.net, backbone.unet) for p in net.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes(), x  # alive, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        task.compute_errors(batch)
    real = sum(size for size, _ in found.values()) / 2**30
    assert abs(count_activations(strip_values(backbone), 4, False) / real - 1) < 0.02


def test_the_table(random_backbone):
    """Guards the figures: more with every batch, less with each option, least with both."""
    said = []
    figures = bench_memory(Backbone(str(random_backbone)), said.append)
    plain, offload, again, both = ([figures[f"counted_{name}_{n}"] for n in BATCHES] for name in OPTIONS)
    assert plain == sorted(plain) and all(a > b > 0 for a, b in zip(plain[-3:], again[-3:], strict=True))
    moments = {round((a - b) * 2**30) for a, b in [*zip(plain, offload, strict=True), *zip(again, both, strict=True)]}
    assert moments == {8 * count_parameters(from_unet(Backbone(str(random_backbone)).unet, 4))}
    assert "| 64 |" in said[-1]
