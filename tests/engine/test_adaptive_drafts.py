"""The rule of drafts on made-up times."""

from __future__ import annotations

import pytest

from abyssal.engine.adaptive_drafts import PASSES_WITH, PASSES_WITHOUT, ROUND, AdaptiveDrafts


def play(payoff: AdaptiveDrafts, running: int, tokens: float, verify_s: float, draft_s: float, plain_s: float) -> None:
    """One pass, as the rule wants it."""
    if payoff.drafts(running):
        payoff.observe(running, running, round(tokens * running), pass_s=verify_s, draft_s=draft_s)
    else:
        payoff.observe(running, 0, running, pass_s=plain_s, draft_s=0.0)


@pytest.mark.parametrize(
    ("tokens", "verify_s", "draft_s", "plain_s", "pays"),
    [
        (1.6, 1.2, 0.2, 1.0, True),
        (1.3, 1.2, 0.2, 1.0, False),
        (1.0, 1.0, 0.1, 1.0, False),
        (1.9, 1.9, 0.1, 1.0, False),
        (2.0, 1.1, 0.8, 1.0, True),
    ],
)
def test_drafts_are_made_where_more_tokens_a_second_come_with_them(
    tokens: float, verify_s: float, draft_s: float, plain_s: float, pays: bool
) -> None:
    payoff = AdaptiveDrafts()
    for passes in range(PASSES_WITH + PASSES_WITHOUT):
        assert payoff.follows(10)
        assert payoff.drafts(10) == (passes < PASSES_WITH)
        play(payoff, 10, tokens, verify_s, draft_s, plain_s)
    assert payoff.follows(10) == payoff.drafts(10) == pays


def test_a_single_slow_pass_does_not_decide() -> None:
    payoff = AdaptiveDrafts()
    for passes in range(PASSES_WITH + PASSES_WITHOUT):
        play(payoff, 2, 1.8, 60.0 if passes == 3 else 1.1, 0.1, 1.0)
    assert payoff.drafts(2)


def test_each_load_is_measured_by_itself() -> None:
    payoff = AdaptiveDrafts()
    for _ in range(PASSES_WITH + PASSES_WITHOUT):
        play(payoff, 1, 1.8, 1.1, 0.1, 1.0)
        play(payoff, 16, 1.8, 1.9, 0.1, 1.0)
    assert payoff.drafts(1)
    assert not payoff.follows(16)
    assert not payoff.follows(31), "the same load: 16 to 31"
    assert payoff.drafts(8), "not measured yet"


def test_what_was_measured_is_measured_again() -> None:
    payoff = AdaptiveDrafts()
    for _ in range(ROUND):
        play(payoff, 4, 1.1, 1.2, 0.1, 1.0)
    assert payoff.drafts(4)
    for _ in range(PASSES_WITH + PASSES_WITHOUT):
        play(payoff, 4, 1.9, 1.2, 0.1, 1.0)
    assert payoff.drafts(4)


def test_a_measurement_waits_for_texts_that_are_followed() -> None:
    payoff = AdaptiveDrafts()
    for _ in range(100):
        payoff.observe(1, 0, 1, pass_s=0.1, draft_s=0.0)
    assert payoff.drafts(1)


def test_drafts_always_pay_where_nothing_adapts() -> None:
    payoff = AdaptiveDrafts(adapts=False)
    for _ in range(ROUND + 10):
        assert payoff.follows(3)
        assert payoff.drafts(3)
        play(payoff, 3, 1.0, 9.0, 9.0, 1.0)
