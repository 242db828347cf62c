"""What the guard refuses, what it remembers, and where it goes back to."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.config.run import GuardConfig
from abyssal.errors import CheckpointError
from abyssal.train.guard import Guard, Refusal, upper_bound

CONFIG = GuardConfig(sigmas=4.0, window_steps=6, min_steps=3, rollback_refusals=2, rollback_steps=5)


def after(losses: list[float], config: GuardConfig = CONFIG) -> Guard:
    guard = Guard()
    for loss in losses:
        guard = guard.accepting(config, loss, 10 * loss)
    return guard


def test_bound_is_the_median_and_so_many_sigmas_of_the_median_deviation() -> None:
    assert upper_bound([3.0, 1.0, 2.0, 2.5, 900.0], 4.0) == pytest.approx(2.5 + 4 * 1.4826 * 0.5)


def test_equal_values_leave_two_percent_a_sigma() -> None:
    assert upper_bound([5.0] * 7, 4.0) == pytest.approx(5.0 + 4 * 0.02 * 5.0)


@given(st.lists(st.floats(0.1, 9.0), min_size=3, max_size=20))
def test_bound_is_never_below_the_median(values: list[float]) -> None:
    assert upper_bound(values, 1.0) > statistics.median(values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step_on(bad: float) -> None:
    assert "the loss is" in str(Guard().judge(CONFIG, bad, 1.0))
    assert "the gradient norm is" in str(Guard().judge(CONFIG, 1.0, bad))


def test_outliers_are_refused_only_after_enough_steps() -> None:
    assert after([2.0, 2.0]).judge(CONFIG, 50.0, 20.0) is None
    assert "the loss is 50, above 2.16" in str(after([2.0] * 3).judge(CONFIG, 50.0, 20.0))
    assert "the gradient norm is 22, above 21.6" in str(after([2.0] * 3).judge(CONFIG, 2.0, 22.0))


def test_low_values_are_never_refused() -> None:
    assert after([2.0] * 6).judge(CONFIG, 0.01, 0.01) is None


def test_only_the_last_steps_are_remembered() -> None:
    guard = after([9.0, 9.0, *range(1, 7)])
    assert guard.losses == (1, 2, 3, 4, 5, 6)
    assert guard.gradient_norms == (10, 20, 30, 40, 50, 60)


def test_refused_sequences_are_skipped_and_old_refusals_are_no_trouble() -> None:
    guard = Guard().refusing(CONFIG, 4, ((12, 16),))
    assert not guard.in_trouble(CONFIG)
    assert not guard.refusing(CONFIG, 9, ((40, 44),)).in_trouble(CONFIG)
    trouble = guard.refusing(CONFIG, 8, ((16, 18), (20, 22)))
    assert trouble.in_trouble(CONFIG)
    assert trouble.skipped == ((12, 18), (20, 22))
    assert trouble.refusals == (Refusal(4, 12, 16), Refusal(8, 16, 22))


def test_rollback_steps_over_the_range_and_the_second_time_over_everything_since_the_state() -> None:
    before = after([2.0] * 3).refusing(CONFIG, 2, ((4, 8),))
    trouble = before.accepting(CONFIG, 7.0, 7.0).refusing(CONFIG, 9, ((32, 36),)).refusing(CONFIG, 11, ((44, 48),))
    first = trouble.rolled_back(before, 3, next_sequence=12)
    assert first.skipped == ((4, 8), (32, 48))
    assert first.losses == before.losses
    assert (first.rollbacks, first.refusals) == ((3,), ())
    again = first.refusing(CONFIG, 9, ((48, 52),)).refusing(CONFIG, 9, ((52, 56),)).rolled_back(before, 3, 12)
    assert again.skipped == ((4, 8), (12, 56))
    assert again.rollbacks == (3, 3)


def test_guard_comes_back_from_json_to_the_bit() -> None:
    guard = after([0.1 + 0.2, 1 / 3, 1e-7]).refusing(CONFIG, 4, ((12, 16), (18, 20)))
    assert Guard.from_json(json.loads(json.dumps(guard.to_json()))) == guard


@pytest.mark.parametrize("values", [None, {}, {"losses": [1]}, Guard().to_json() | {"skipped": [[1]]}])
def test_other_json_is_refused(values: object) -> None:
    with pytest.raises(CheckpointError, match="is not what a training state holds"):
        Guard.from_json(values)
