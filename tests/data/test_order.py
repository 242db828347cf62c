from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.data.order import WindowOrder
from abyssal.errors import UsageError

SEEDS = st.integers(0, 2**40)
RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda r: (r[0], r[0] + r[1])), max_size=5)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, windows=st.integers(1, 130), epoch=st.integers(0, 10**6))
def test_every_epoch_visits_each_window_once(seed: int, windows: int, epoch: int) -> None:
    order = WindowOrder(seed, windows)
    first = epoch * windows
    assert sorted(order.window(first + n) for n in range(windows)) == list(range(windows))


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, windows=st.integers(1, 40), skipped=RANGES, start=st.integers(0, 200))
def test_order_goes_on_from_every_point_as_if_never_stopped(seed, windows, skipped, start: int) -> None:
    def run(order: WindowOrder, sequences: range) -> list[int]:
        return [order.window(order.effective(n)) for n in sequences]

    whole = run(WindowOrder(seed, windows, skipped), range(300))
    assert run(WindowOrder(seed, windows, skipped), range(start, 300)) == whole[start:]


@settings(max_examples=60, deadline=None)
@given(skipped=RANGES)
def test_skipped_sequences_are_passed_over_and_no_other(skipped: list[tuple[int, int]]) -> None:
    order = WindowOrder(0, 9, skipped)
    left = [n for n in range(400) if not any(start <= n < stop for start, stop in skipped)]
    assert [order.effective(n) for n in range(300)] == left[:300]


def test_skipped_ranges_that_touch_become_one() -> None:
    assert WindowOrder(0, 9, [(7, 9), (2, 4), (4, 5), (8, 12)]).skipped == ((2, 5), (7, 12))


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, windows=st.integers(10**9, 10**14), first=st.integers(0, 10**15))
def test_huge_streams_are_ordered_without_a_table(seed: int, windows: int, first: int) -> None:
    order = WindowOrder(seed, windows)
    first -= first % windows  # 200 sequences of one epoch
    found = [order.window(first + n) for n in range(200)]
    assert len(set(found)) == 200
    assert all(0 <= window < windows for window in found)


def test_epochs_and_seeds_differ() -> None:
    orders = [[WindowOrder(seed, 50).window(epoch * 50 + n) for n in range(50)] for seed in (3, 4) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("windows", [3, 7, 16])
def test_each_window_is_as_likely_as_another_at_each_place(windows: int) -> None:
    draws = 400 * windows
    for place in (0, windows - 1):
        counts = Counter(WindowOrder(seed, windows).window(place) for seed in range(draws))
        assert min(counts.values()) > 300  # 400 expected, with a standard deviation below 20
        assert max(counts.values()) < 500
        assert len(counts) == windows


def test_neighbours_do_not_stay_neighbours() -> None:
    order = WindowOrder(1, 10_000)
    places = [order.window(n) for n in range(10_000)]
    assert sum(b == a + 1 for a, b in pairwise(places)) < 10  # 1 expected


def test_order_is_the_one_that_earlier_runs_had() -> None:
    assert [WindowOrder(5, 10).window(n) for n in range(20)] == [
        *(3, 1, 0, 5, 2, 6, 8, 9, 7, 4),
        *(3, 7, 8, 5, 1, 0, 6, 4, 9, 2),
    ]


@pytest.mark.parametrize("windows", [0, -3])
def test_no_windows_are_refused(windows: int) -> None:
    with pytest.raises(UsageError, match=f"windows={windows}: must be at least 1"):
        WindowOrder(0, windows)


@pytest.mark.parametrize("skipped", [(3, 3), (5, 4), (-1, 2)])
def test_impossible_skipped_ranges_are_refused(skipped: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="must be a range"):
        WindowOrder(0, 9, [skipped])


def test_order_is_the_one_that_runs_began_with() -> None:
    order = WindowOrder(7, 10)
    assert [order.window(n) for n in range(20)] == [1, 3, 8, 6, 5, 9, 7, 2, 0, 4, 4, 6, 7, 1, 5, 9, 0, 3, 2, 8]


def test_order_can_skip_other_ranges() -> None:
    order = WindowOrder(7, 10, [(1, 3)]).skipping([(2, 4)])
    assert (order.seed, order.windows, order.skipped) == (7, 10, ((2, 4),))
