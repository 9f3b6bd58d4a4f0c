"""Learning-rate factors against a table; each value is worked out by hand."""

from types import SimpleNamespace

import pytest

from harmony.core.errors import UserError
from harmony.training.schedule import count_steps, decay_linearly, warm_up, warm_up_from


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


def test_a_decay_needs_an_end():
    """Guards ``trainer.max_steps=-1`` with a decay: one clear line."""
    assert count_steps(SimpleNamespace(estimated_stepping_batches=7)) == 7
    with pytest.raises(UserError, match="trainer.max_steps"):
        count_steps(SimpleNamespace(estimated_stepping_batches=float("inf")))
