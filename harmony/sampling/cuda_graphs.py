"""CUDA graphs: a step of a sampler is recorded once a shape and replayed, without the launch of each kernel.

A graph reads and writes fixed addresses. So what a step depends on lies in buffers that are filled before each batch
(the constants of a network) and before each step (the latent and its timestep).
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch

KEPT = 4  # recordings at most: each holds the activations of one step


class Network(Protocol):
    """What can be recorded: two ways to compute a step, and the tensors that stay the same over a batch."""

    @property
    def constants(self) -> list[torch.Tensor]: ...

    def copy_constants(self) -> None:
        """Put copies in the place of ``constants``, so that nobody else holds them."""
        ...

    def whole(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor: ...

    def second_half(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor: ...


Step = Callable[..., torch.Tensor]


class Graph:
    """``step`` of tensors whose shapes never change, recorded from ``inputs`` and replayed."""

    def __init__(self, step: Step, *inputs: torch.Tensor):
        self.device = inputs[0].device
        self.inputs = [x.clone() for x in inputs]  # where the graph reads
        with torch.cuda.device(self.device):  # of several GPUs the one that the networks are on, whichever is current
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):  # libraries set themselves up in the first call, which cannot be recorded
                step(*self.inputs)
            here.wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=aside):
                self.output = step(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        with torch.cuda.device(self.device):
            for own, x in zip(self.inputs, inputs, strict=True):
                own.copy_(x)
            self.graph.replay()
            return self.output.clone()  # the next replay writes there again


class Recording:
    """The steps of a network as graphs, each recorded when it is first wanted and kept for every later batch."""

    def __init__(self, network: Network, record: Callable[..., Step] = Graph):
        network.copy_constants()
        self.network, self.record = network, record
        self.graphs: dict[tuple[int, bool], Step] = {}

    def load(self, network: Network) -> None:
        """Take over the constants of another batch."""
        if network is not self.network:
            for own, x in zip(self.network.constants, network.constants, strict=True):
                own.copy_(x)

    def __call__(self, z: torch.Tensor, t: torch.Tensor, fresh: bool) -> torch.Tensor:
        """The network's output; ``fresh``: of the whole network, else of its second half alone."""
        key = len(t), fresh
        if key not in self.graphs:
            self.graphs[key] = self.record(self.network.whole if fresh else self.network.second_half, z, t)
        return self.graphs[key](z, t)


_recordings: OrderedDict[Hashable, Recording] = OrderedDict()


def recording_of(key: Hashable, network: Network, record: Callable[..., Step] = Graph) -> Recording:
    """The recording that ``key`` stands for, with the constants of ``network``; the ``KEPT`` last used are kept.

    ``key`` names the networks, by identity and address of their weights, and all shapes. A recording holds its
    networks, so that no other can take their identity.
    """
    recording = _recordings.pop(key, None) or Recording(network, record)
    recording.load(network)
    _recordings[key] = recording
    while len(_recordings) > KEPT:
        _recordings.popitem(last=False)
    return recording


def identity(net: torch.nn.Module) -> tuple[int, int]:
    """What tells a network, where it lies now, from any other."""
    return id(net), net.conv_in.weight.data_ptr()


def side_by_side(jobs: Sequence[Callable[[], object]], device: torch.device) -> list:
    """The results of ``jobs``, none of which needs another's.

    While a graph is recorded each has a stream, and so a branch of the graph, of its own. Without a graph streams cost
    more than they bring: at one picture a GPU waits for launches, not for its cores.
    """
    if device.type != "cuda" or len(jobs) < 2 or not torch.cuda.is_current_stream_capturing():
        return [job() for job in jobs]
    here, streams = torch.cuda.current_stream(device), [torch.cuda.Stream(device) for _ in jobs]
    results = []
    for job, stream in zip(jobs, streams, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            results.append(job())
    for stream in streams:
        here.wait_stream(stream)
    return results
