from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.data import mixture
from abyssal.data.mixture import MixedOrder, Mixture
from abyssal.errors import ConfigError

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=7)


@settings(max_examples=80, deadline=None)
@given(weights=WEIGHTS)
def test_every_source_is_within_one_of_its_share_at_every_point(weights: list[int]) -> None:
    mixture, counts = Mixture(weights), [0] * len(weights)
    for n in range(2 * mixture.period + 5):
        source, draw = mixture.draw(n)
        assert draw == counts[source]
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (n + 1) * Fraction(weight, sum(weights))) < 1


@pytest.mark.parametrize("first", [0, 1, 13, 999_983, 10**12 + 7])
def test_shares_hold_in_any_window(first: int) -> None:
    mixture = Mixture([0.7, 0.2, 0.07, 0.03])
    for length in (1, 10, 137):
        drawn = [mixture.draw(n)[0] for n in range(first, first + length)]
        for source, share in enumerate((0.7, 0.2, 0.07, 0.03)):
            assert abs(drawn.count(source) - share * length) < 2


def test_only_ratios_matter_and_decimals_are_what_they_read() -> None:
    assert Mixture([0.1, 0.2, 0.7]).shares == Mixture([1.0, 2.0, 7.0]).shares == [1, 2, 7]
    assert Mixture([1e-4, 0.9999]).shares == [1, 9999]
    assert Mixture([3.5]).shares == [1]


def test_weights_too_fine_for_a_table_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources: the weights are 123457:1000000 .* at most 100000; round"):
        Mixture([0.123457, 1])


def test_each_source_has_epochs_of_its_own() -> None:
    order = MixedOrder(3, {"a": 5, "b": 11, "c": 2}, {"c": 1.0, "a": 3.0, "b": 2.0})
    assert order.windows == 18
    drawn = [order.window(n) for n in range(600)]
    for first, windows, share in ((0, 5, 300), (5, 11, 200), (16, 2, 100)):
        mine = [window - first for window in drawn if first <= window < first + windows]
        assert len(mine) == share
        for epoch in range(share // windows):
            assert sorted(mine[epoch * windows : (epoch + 1) * windows]) == list(range(windows))


def test_a_source_keeps_its_order_when_weights_and_others_change() -> None:
    def of_b(order: MixedOrder, first: int) -> list[int]:
        drawn = (order.window(n) - first for n in range(400))
        return [window for window in drawn if 0 <= window < 11][:60]

    assert of_b(MixedOrder(3, {"a": 5, "b": 11}, {"a": 1, "b": 1}), 5) == of_b(
        MixedOrder(3, {"b": 11, "c": 7}, {"b": 4, "c": 3}), 0
    )


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 200), stop=st.integers(201, 260))
def test_mixture_goes_on_from_every_point_as_if_never_stopped(start: int, stop: int) -> None:
    def order() -> MixedOrder:
        return MixedOrder(9, {"a": 4, "b": 9}, {"a": 0.3, "b": 0.7}, skipped=[(20, 25)])

    whole = [order().window(order().effective(n)) for n in range(300)]
    again = order()
    assert [again.window(again.effective(n)) for n in range(start, stop)] == whole[start:stop]


def test_the_table_of_a_mixture_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, rhythm = [], mixture._rhythm
    monkeypatch.setattr(mixture, "_rhythm", lambda shares: made.append(shares) or rhythm(shares))
    order = MixedOrder(3, {"a": 5, "b": 11}, {"a": 3, "b": 1})
    plain = [order.window(order.effective(n)) for n in range(40)]
    for _ in range(3):
        order = order.skipping([(2, 5), (9, 11)])
    assert [order.window(order.effective(n)) for n in range(35)] == plain[:2] + plain[5:9] + plain[11:]
    assert order.skipping([]).effective(30) == 30
    assert len(made) == 1
