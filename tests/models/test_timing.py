"""Where the time goes: every pass is counted, and nothing stays behind."""

import time

import pytest
import torch

from harmony.models.timing import timed


class Slow(torch.nn.Module):
    def forward(self, x):
        if x is None:
            raise ValueError("nothing")
        time.sleep(0.02)
        return x


def test_time_inside_modules_is_counted_by_name():
    """Guards the sums: several modules under one name, only while it lasts, hooks gone after an error too."""
    a, b, other, device = Slow(), Slow(), Slow(), torch.device("cpu")
    with timed({"both": [a, b], "other": [other]}, device) as spent:
        for module in (a, b, a, other):
            module(1)
    assert spent["both"] >= 0.06 and 0.02 <= spent["other"] < spent["both"]
    before = dict(spent)
    a(1)
    with pytest.raises(ValueError, match="nothing"), timed({"a": [a]}, device):
        a(None)
    assert dict(spent) == before and not a._forward_hooks and not a._forward_pre_hooks
