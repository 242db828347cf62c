"""Thinning keeps extremes, gaps and order; the running mean is one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.report.curve import downsample, running_mean

VALUES = st.lists(st.floats(-100, 100) | st.just(float("nan")), min_size=1, max_size=200)


@given(values=VALUES, buckets=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_thinning_keeps_extremes_and_invents_nothing(values: list[float], buckets: int) -> None:
    x, y = np.arange(len(values), dtype=float), np.array(values)
    kept_x, kept_y = downsample(x, y, buckets)
    assert len(kept_x) <= 2 * buckets
    assert (np.diff(kept_x) > 0).all()
    np.testing.assert_array_equal(kept_y, y[kept_x.astype(int)])
    finite = y[np.isfinite(y)]
    if len(finite):
        assert (np.nanmin(kept_y), np.nanmax(kept_y)) == (finite.min(), finite.max())


def test_one_spike_among_many_steps_stays() -> None:
    y = np.ones(100_003)
    y[70_001] = 9.0
    x, kept = downsample(np.arange(len(y), dtype=float), y, 50)
    assert x[kept == 9.0].tolist() == [70_001]


def test_part_without_a_finite_value_stays_a_gap() -> None:
    y = np.concatenate([np.ones(30), np.full(30, np.nan), np.ones(30)])
    _, kept = downsample(np.arange(90.0), y, 3)
    assert np.isnan(kept).tolist() == [False, True, False]


def test_running_mean_looks_back_over_finite_values_only() -> None:
    y = np.array([np.nan, 1.0, 3.0, np.nan, 8.0])
    np.testing.assert_allclose(running_mean(y, 3), [np.nan, 1.0, 2.0, 2.0, 5.5])


@pytest.mark.parametrize("window", [1, 4, 50])
def test_running_mean_of_a_constant_is_the_constant(window: int) -> None:
    np.testing.assert_allclose(running_mean(np.full(9, 2.5), window), np.full(9, 2.5))
