"""Measuring: what a ratio is made of, how work is counted, and that blocks alternate."""

import pytest
import torch

from harmony.benchmarks.measure import Rates, alternate, count_tflop, measure_matmul_rate, measure_peak_memory

CPU = torch.device("cpu")


def test_a_ratio_is_that_of_neighbouring_blocks():
    """Guards the figures: the median of the ratios of pairs, not the ratio of medians, with its range."""
    figures = Rates([10.0, 30.0, 20.0], [5.0, 10.0, 20.0]).summarize(tflop=0.5, peak=20.0)
    assert (figures["ratio"], figures["ratio_min"], figures["ratio_max"]) == (2.0, 1.0, 3.0)
    assert (figures["ours"], figures["reference"]) == (20.0, 10.0)
    assert (figures["tflops"], figures["share_of_peak"]) == (10.0, 0.5)
    assert "tflops" not in Rates([1.0], [1.0]).summarize()


def test_blocks_alternate_behind_a_warm_up():
    calls, said = [], []
    rates = alternate(lambda: calls.append("a"), lambda: calls.append("b"), 4, CPU, 3, 2, said.append)
    assert "".join(calls) == "aabb" + 2 * ("aaa" + "bbb")
    assert len(rates.ours) == len(rates.reference) == len(said) == 2 and min(rates.ours) > 0


def test_work_is_counted_in_multiplications_and_additions(monkeypatch):
    a = torch.randn(8, 16), torch.randn(16, 32)
    assert count_tflop(lambda: a[0] @ a[1], 2) == pytest.approx(2 * 8 * 16 * 32 / 2 / 1e12)
    monkeypatch.setattr("harmony.benchmarks.measure.SIDES", {"cpu": 64})
    assert measure_matmul_rate(CPU, torch.float32, blocks=2) > 0 and 0.05 < measure_peak_memory(CPU) < 64
