"""Learning-rate factors against a table; each value is worked out by hand."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Timer

from harmony.core.errors import UserError
from harmony.training.schedule import decay_linearly, decay_to_end, estimate_seconds_left, warm_up, warm_up_from


@pytest.mark.parametrize(
    "n, factor",
    [
        (0, 1e-4),  # not 0: the first step must change something
        (1, 2e-4),
        (4_999, 0.5),
        (9_999, 1.0),  # the last step of the warm-up
        (10_000, 1.0),
        (100_000, 1.0),
    ],
)
def test_the_warm_up_of_liu_2025(n, factor):
    assert warm_up(10_000)(n) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    "n, factor", [(0, 1e-6), (1, 1.01e-4), (5_000, 0.5000005), (9_999, 0.9999), (10_000, 1.0), (50_000, 1.0)]
)
def test_paint_by_examples_warm_up(n, factor):
    """Guards the warm-up of the released code of Yang 2022, which begins at 1e-6."""
    assert warm_up_from(10_000)(n) == pytest.approx(factor, rel=1e-4)


def test_without_warm_up_the_factor_is_one():
    assert [warm_up()(n) for n in (0, 1, 7)] == [warm_up_from(0)(n) for n in (0, 1, 7)] == [1, 1, 1]


@pytest.mark.parametrize("n, factor", [(0, 0.5), (1, 0.9), (2, 0.8), (5, 0.5), (9, 0.1), (10, 0.0), (11, 0.0)])
def test_linear_decay_over_ten_steps_with_a_warm_up_of_two(n, factor):
    assert decay_linearly(10, 2)(n) == pytest.approx(factor, abs=1e-12)


class Clock(Timer):
    """Lightning's timer of ten seconds of which ``elapsed`` are over."""

    def __init__(self, elapsed: float):
        super().__init__({"seconds": 10})
        self.elapsed = elapsed

    def time_elapsed(self, stage: str = "train") -> float:
        return self.elapsed


def make_trainer(steps: float, *callbacks: Timer, world_size: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        estimated_stepping_batches=steps, callbacks=list(callbacks), world_size=world_size, global_step=4
    )


def test_a_decay_needs_an_end():
    """Guards ``trainer.max_steps=-1`` with a decay: one clear line; processes whose clocks differ share no rate."""
    assert decay_to_end(make_trainer(10), 2)(5) == 0.5
    for trainer in (make_trainer(float("inf")), make_trainer(float("inf"), Clock(1), world_size=2)):
        with pytest.raises(UserError, match="trainer.max_steps"):
            decay_to_end(trainer)


def test_a_run_that_the_clock_ends_decays_by_the_clock(capsys):
    """Guards ``trainer.max_time``: the rate reaches 0 when the time is up, or at the last step before."""
    endless, counted = make_trainer(float("inf"), Clock(7.5)), make_trainer(10, Clock(7.5))
    assert decay_to_end(endless, 2)(0) == 0.125 and decay_to_end(endless, 2)(100) == 0.25
    assert decay_to_end(counted)(5) == 0.25 and decay_to_end(counted)(9) == pytest.approx(0.1)
    assert decay_to_end(make_trainer(10, Clock(12)))(5) == 0
    assert not capsys.readouterr().out
    assert decay_to_end(make_trainer(10, Clock(7.5), world_size=2))(5) == 0.5
    assert "decays by trainer.max_steps, not by trainer.max_time" in capsys.readouterr().out
    assert estimate_seconds_left(endless, 3.0) == 2.5 and estimate_seconds_left(counted, 0.1) == pytest.approx(0.6)
    assert estimate_seconds_left(make_trainer(10), 3.0) == 18
