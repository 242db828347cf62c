from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.engine import SamplingParameters, sample
from abyssal.errors import UsageError

LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.3, 1.1, -4.0, 0.9])


def draws(logits: torch.Tensor, count: int, **parameters: Any) -> Counter[int]:
    settings = SamplingParameters(**parameters)
    generator = SamplingParameters(seed=11).generator()
    return Counter(sample(logits, settings, generator) for _ in range(count))


def kept(logits: torch.Tensor, **parameters: Any) -> set[int]:
    """Return the tokens that come up in so many draws that none of those here is missed by chance."""
    return set(draws(logits, 600, **parameters))


def test_temperature_zero_takes_the_most_probable_and_of_equals_the_first() -> None:
    assert draws(torch.tensor([1.0, 3.0, 3.0, -1.0]), 5, temperature=0) == {1: 5}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_frequencies_are_those_of_the_softmax_at_the_temperature(temperature: float) -> None:
    count = 8000
    found = draws(LOGITS, count, temperature=temperature, top_p=1.0)
    expected = (LOGITS.double() / temperature).softmax(-1) * count
    chi_square = sum((found[i] - e) ** 2 / e for i, e in enumerate(expected.tolist()))
    assert chi_square < 22.5  # the 0.1% point for 6 degrees of freedom; the seed is fixed


def test_frequencies_are_those_of_the_softmax_over_the_tokens_that_top_p_keeps() -> None:
    count = 8000
    probabilities = LOGITS.double().softmax(-1)
    best = [2, 4, 6]  # 0.511 + 0.208 + 0.170 = 0.889: two of them are too few for 0.8
    found = draws(LOGITS, count, temperature=1.0, top_p=0.8)
    assert set(found) == set(best)
    expected = probabilities[best] / probabilities[best].sum() * count
    chi_square = sum((found[i] - e) ** 2 / e for i, e in zip(best, expected.tolist(), strict=True))
    assert chi_square < 13.8  # the 0.1% point for 2 degrees of freedom


@pytest.mark.parametrize(
    ("probabilities", "top_p", "expected"),
    [
        ((0.5, 0.25, 0.25), 0.5, {0}),  # reached exactly by one
        ((0.5, 0.25, 0.25), 0.51, {0, 1}),  # of two equals the lower id
        ((0.25, 0.5, 0.25), 0.76, {0, 1, 2}),
        ((0.25, 0.25, 0.25, 0.25), 0.3, {0, 1}),
        ((0.1, 0.2, 0.7), 1e-9, {2}),  # at least one token
        ((0.0, 0.2, 0.8), 1.0, {1, 2}),
    ],
    ids=str,
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(
    probabilities: tuple[float, ...], top_p: float, expected: set[int]
) -> None:
    logits = torch.tensor(probabilities, dtype=torch.float64).log()
    assert kept(logits, temperature=1.0, top_p=top_p) == expected


@pytest.mark.parametrize(("top_k", "expected"), [(1, {2}), (3, {2, 4, 6}), (4, {0, 2, 4, 6}), (6, {0, 1, 2, 3, 4, 6})])
def test_top_k_keeps_the_k_most_probable_and_of_equals_the_first(top_k: int, expected: set[int]) -> None:
    assert kept(LOGITS, temperature=1.5, top_p=1.0, top_k=top_k) == expected


def test_top_p_counts_within_what_top_k_keeps() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    assert kept(logits, temperature=1.0, top_p=0.57, top_k=2) == {0}  # 0.4 of 0.7 is 0.571
    assert kept(logits, temperature=1.0, top_p=0.57, top_k=0) == {0, 1}


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 8), min_size=1, max_size=40),
    top_p=st.floats(0.001, 1.0),
    top_k=st.integers(0, 41),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
)
def test_a_drawn_token_is_in_the_set_that_a_loop_keeps(
    logits: list[int], top_p: float, top_k: int, temperature: float
) -> None:
    exponentials = [math.exp((x - max(logits)) / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: (-exponentials[i], i))[: top_k or None]
    total = sum(exponentials[i] for i in ranked)
    allowed, reached = set(), 0.0
    for i in ranked:
        if reached >= top_p + 1e-12:
            break
        allowed.add(i)
        reached += exponentials[i] / total
    found = draws(torch.tensor(logits, dtype=torch.float32), 20, temperature=temperature, top_p=top_p, top_k=top_k)
    assert set(found) <= allowed


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    for parameters in ({"top_p": 1.0}, {"top_p": 0.9}, {"top_p": 1.0, "top_k": 4}):
        assert kept(logits, temperature=1.0, **parameters) == {1, 3}


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (1.0, 3)])  # 1.0: where the product with the mass rounds up
def test_the_ends_of_the_random_numbers_do_not_lead_to_barred_tokens(
    monkeypatch: pytest.MonkeyPatch, number: float, token: int
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([number], dtype=torch.float64))
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    assert draws(logits, 1, temperature=1.0, top_p=1.0) == {token: 1}


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_extreme_temperatures_do_not_overflow(temperature: float) -> None:
    found = kept(LOGITS * 1000, temperature=temperature, top_p=1.0)
    assert found == ({2} if temperature < 1 else set(range(7)))


def test_the_same_seed_draws_the_same_and_none_draws_anew() -> None:
    def text(seed: int | None) -> list[int]:
        parameters = SamplingParameters(temperature=2.0, top_p=1.0, seed=seed)
        generator = parameters.generator()
        return [sample(LOGITS, parameters, generator) for _ in range(40)]

    assert text(5) == text(5)
    assert text(5) != text(6)
    assert text(None) != text(None)


def test_half_precision_logits_are_taken_as_they_are() -> None:
    assert draws(LOGITS.bfloat16(), 300, seed=1) == draws(LOGITS.bfloat16().double(), 300, seed=1)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("max_new_tokens", 2.0, "a whole number"),
        ("max_new_tokens", True, "a whole number"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", math.inf, "at least 0"),
        ("temperature", math.nan, "at least 0"),
        ("temperature", "warm", "a number"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_p", math.nan, "above 0 and at most 1"),
        ("top_k", -1, "at least 0"),
        ("seed", -1, "from 0 to 2"),
        ("seed", 2**63, "from 0 to 2"),
        ("stop", ("a", ""), "none of them empty"),
        ("stop", "end", "a tuple of strings"),
    ],
)
def test_impossible_parameters_are_refused_with_field_value_and_range(field: str, value: object, allowed: str) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParameters(**{field: value})  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{field}={value!r}: must be ")
    assert allowed in str(caught.value)
