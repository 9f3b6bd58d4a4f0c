"""Where the time goes: every pass is counted, nothing stays behind, and a GPU is never waited for."""

import time

import pytest
import torch

from harmony.models import timing
from harmony.models.timing import measure_time


class Slow(torch.nn.Module):
    def forward(self, x):
        if x is None:
            raise ValueError("nothing")
        time.sleep(0.02)
        return x


def test_time_inside_modules_is_counted_by_name():
    """Guards the sums: several modules under one name, only while it lasts, hooks gone after an error too."""
    a, b, other, device = Slow(), Slow(), Slow(), torch.device("cpu")
    with measure_time({"both": [a, b], "other": [other]}, device) as spent:
        for module in (a, b, a, other):
            module(1)
    assert spent["both"] >= 0.06 and 0.02 <= spent["other"] < spent["both"]
    before = dict(spent)
    a(1)
    with pytest.raises(ValueError, match="nothing"), measure_time({"a": [a]}, device):
        a(None)
    assert dict(spent) == before and not a._forward_hooks and not a._forward_pre_hooks


@pytest.fixture
def device(monkeypatch):
    """A device that passes its events later: ``steps`` says what was asked of it, and whether a graph is recorded."""
    steps, state = [], {"capturing": False}

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self):
            assert not state["capturing"], "operation not permitted when stream is capturing"
            steps.append("record")

        def synchronize(self):
            steps.append("wait")

        def elapsed_time(self, other) -> float:
            return 500.0

    def refuse(*_):
        raise AssertionError("the whole device was waited for")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    return steps, state


def test_a_gpu_is_not_waited_for_while_it_works(device):
    """Guards the clock of a GPU: events alone while modules run, and nothing at all while a graph is recorded."""
    steps, state = device
    a = Slow()
    with measure_time({"a": [a]}, torch.device("cuda")) as spent:
        a(1)
        a(1)
        assert steps == ["record"] * 4, "no wait while the block lasts"
        state["capturing"] = True
        a(1)
        state["capturing"] = False
    assert steps[4:] == ["wait", "wait"] and spent == {"a": 1.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_seconds_on_a_gpu_are_those_of_its_work():
    """Guards the events: the same seconds as a wait around the same work."""
    net = torch.nn.Linear(4096, 4096).cuda()
    x = torch.randn(4096, 4096, device="cuda")
    began = timing.now(x.device)
    with measure_time({"net": [net]}, x.device) as spent:
        for _ in range(20):
            net(x)
    assert 0 < spent["net"] <= timing.now(x.device) - began
