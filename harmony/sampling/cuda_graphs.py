"""CUDA graphs: a sampler's step is recorded once for each shape and replayed, without launching each kernel.

A graph reads and writes fixed addresses. So the inputs of a step lie in buffers that are filled before each batch (the
constants of a network) and before each step (the latent and its timestep).
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch

MAX_RECORDINGS = 4  # each recording holds the activations of one step


class Network(Protocol):
    """A network that can be recorded: two ways to compute a step, and the tensors that are constant over a batch."""

    @property
    def constants(self) -> list[torch.Tensor]: ...

    def copy_constants(self) -> None:
        """Replace ``constants`` by copies that nothing else refers to."""
        ...

    def run(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Compute a step with the whole network."""
        ...

    def run_second_half(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Compute a step with the second half, from the activations of an earlier step."""
        ...


Step = Callable[..., torch.Tensor]


class Graph:
    """A recorded ``step`` for tensors of the shapes of ``inputs``."""

    def __init__(self, step: Step, *inputs: torch.Tensor):
        self.device = inputs[0].device
        self.inputs = [x.clone() for x in inputs]  # the buffers that the graph reads
        with torch.cuda.device(self.device):  # the networks' GPU may not be the current one
            stream, side_stream = torch.cuda.current_stream(), torch.cuda.Stream()
            side_stream.wait_stream(stream)
            with torch.cuda.stream(side_stream):  # the first call initializes libraries, which cannot be recorded
                step(*self.inputs)
            stream.wait_stream(side_stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=side_stream):
                self.output = step(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        with torch.cuda.device(self.device):
            for buffer, x in zip(self.inputs, inputs, strict=True):
                buffer.copy_(x)
            self.graph.replay()
            return self.output.clone()  # the next replay overwrites it


class Recording:
    """The steps of a network as graphs, each recorded at first use and kept for later batches."""

    def __init__(self, network: Network, record: Callable[..., Step] = Graph):
        network.copy_constants()
        self.network, self.record = network, record
        self.graphs: dict[tuple[int, bool], Step] = {}

    def load(self, network: Network) -> None:
        """Copy the constants of another batch into the buffers."""
        if network is not self.network:
            for buffer, x in zip(self.network.constants, network.constants, strict=True):
                buffer.copy_(x)

    def __call__(self, z: torch.Tensor, t: torch.Tensor, is_whole: bool) -> torch.Tensor:
        """The network's output; ``is_whole``: by the whole network, else only by its second half."""
        key = len(t), is_whole
        if key not in self.graphs:
            self.graphs[key] = self.record(self.network.run if is_whole else self.network.run_second_half, z, t)
        return self.graphs[key](z, t)


_recordings: OrderedDict[Hashable, Recording] = OrderedDict()


def get_recording(key: Hashable, network: Network, record: Callable[..., Step] = Graph) -> Recording:
    """The recording of ``key``, with the constants of ``network``; the last ``MAX_RECORDINGS`` used are kept.

    ``key`` contains the identity of the networks, the address of their weights and all shapes. A recording keeps a
    reference to its networks, so that no other network can get the same identity.
    """
    recording = _recordings.pop(key, None) or Recording(network, record)
    recording.load(network)
    _recordings[key] = recording
    while len(_recordings) > MAX_RECORDINGS:
        _recordings.popitem(last=False)
    return recording


def identity(net: torch.nn.Module) -> tuple[int, int]:
    """A key of a network and the place of its weights."""
    return id(net), net.conv_in.weight.data_ptr()


def run_concurrently(jobs: Sequence[Callable[[], object]], device: torch.device) -> list:
    """Run independent ``jobs`` and return their results.

    While a graph is recorded, each job has its own stream and so its own branch of the graph. Without a graph streams
    are slower: with one picture a GPU waits for kernel launches, not for its cores.
    """
    if device.type != "cuda" or len(jobs) < 2 or not torch.cuda.is_current_stream_capturing():
        return [job() for job in jobs]
    main_stream, streams = torch.cuda.current_stream(device), [torch.cuda.Stream(device) for _ in jobs]
    results = []
    for job, stream in zip(jobs, streams, strict=True):
        stream.wait_stream(main_stream)
        with torch.cuda.stream(stream):
            results.append(job())
    for stream in streams:
        main_stream.wait_stream(stream)
    return results
