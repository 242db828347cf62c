"""What a request adds to the logits, against the formulas spelled out a token at a time."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from abyssal.engine import SamplingParameters
from abyssal.engine.sampler import Sampler
from abyssal.engine.sampling import sample
from abyssal.errors import ModelDirectoryError, UsageError

V = 11


def logits_at(seed: int) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 2


def choose(sampler: Sampler, logits: torch.Tensor) -> Any:
    return sampler.choose(logits)


def changed(logits: list[float], prompt: list[int], text: list[int], p: SamplingParameters) -> list[float]:
    """The definition."""
    counts = Counter(text)
    values = []
    for token, value in enumerate(logits):
        value += dict(p.logit_bias).get(token, 0.0)
        if token in prompt or token in text:
            value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
        if counts[token]:
            value -= p.presence_penalty + p.frequency_penalty * counts[token]
        values.append(value)
    return values


@pytest.mark.parametrize("seed", range(12))
def test_penalties_and_bias_are_those_of_their_formulas(seed: int) -> None:
    source = random.Random(seed)
    p = SamplingParameters(
        temperature=0,
        presence_penalty=source.uniform(-2, 2),
        frequency_penalty=source.uniform(0.5, 2),
        repetition_penalty=source.uniform(0.5, 2),
        logit_bias=tuple((token, source.uniform(-3, 3)) for token in source.sample(range(V), 4)),
    )
    prompt = [source.randrange(V) for _ in range(3)]
    sampler, text = Sampler(p, prompt), list[int]()
    for place in range(15):
        logits = logits_at(100 * seed + place)
        untouched = logits.clone()
        token = choose(sampler, logits)
        wanted = changed(logits.tolist(), prompt, text, p)
        assert token.id == max(range(V), key=wanted.__getitem__)
        assert token.logprob == pytest.approx(float(logits.double().log_softmax(-1)[token.id]), abs=1e-5)
        assert torch.equal(logits, untouched)
        text.append(token.id)
    assert len(set(text)) > 2


def test_each_penalty_counts_by_itself() -> None:
    base = Sampler(SamplingParameters(temperature=0), [1])
    assert base.takes_likeliest
    logits = torch.zeros(V)
    logits[3], logits[5] = 2.0, 1.5
    for change, second in (
        ({"presence_penalty": 1.0}, 5),
        ({"frequency_penalty": 0.4}, 3),
        ({"repetition_penalty": 2.0}, 5),
        ({"logit_bias": ((5, 0.4),)}, 3),
        ({"logit_bias": ((5, 0.6),)}, 5),
    ):
        sampler = Sampler(SamplingParameters(temperature=0, **change), [1])
        assert not sampler.takes_likeliest
        choose(sampler, logits)
        assert choose(sampler, logits).id == second


def test_a_frequent_token_is_penalised_more_each_time() -> None:
    logits = torch.zeros(V)
    logits[3], logits[5] = 2.0, 1.5
    sampler = Sampler(SamplingParameters(temperature=0, frequency_penalty=0.2), [])
    assert [choose(sampler, logits).id for _ in range(6)] == [3, 3, 3, 5, 3, 5]


def test_a_seed_gives_the_tokens_of_plain_sampling_and_an_index_those_of_the_next_seed() -> None:
    for index in (0, 3):
        p = SamplingParameters(temperature=1.1, top_p=0.95, seed=40)
        sampler = Sampler(p, [1, 2], index)
        generator = SamplingParameters(seed=40 + index).generator()
        for place in range(20):
            logits = logits_at(place)
            assert choose(sampler, logits).id == sample(logits, p, generator)
    assert SamplingParameters(seed=2**63 - 1).generator(1).initial_seed() == 0


def test_min_p_keeps_tokens_at_least_so_probable_beside_the_likeliest() -> None:
    probabilities = torch.tensor([0.4, 0.19, 0.21, 0.1, 0.1])
    generator = torch.Generator().manual_seed(0)
    draw = lambda **change: Counter(  # noqa: E731
        sample(probabilities.log(), SamplingParameters(temperature=1, **change), generator) for _ in range(3000)
    )
    counts = draw(min_p=0.5, top_p=1)
    assert set(counts) == {0, 2}
    assert counts[0] / 3000 == pytest.approx(0.4 / 0.61, abs=0.04)
    assert set(draw(min_p=0.4, top_p=0.7)) == {0, 2}, "of what is left, 0.5 and 0.2625 reach 0.7"
    assert set(draw(min_p=0.4, top_p=0.8)) == {0, 1, 2}
    assert set(draw(min_p=0.2, top_k=3, top_p=1)) == {0, 1, 2}
    assert set(draw(min_p=1, top_p=1)) == {0}


class Even:
    """Only even tokens, and every token once."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def allowed(self) -> torch.Tensor | None:
        mask = torch.arange(V) % 2 == 0
        mask[self.taken] = False
        return mask

    def advance(self, token: int) -> None:
        self.taken.append(token)


@pytest.mark.parametrize("temperature", [0, 2.0])
def test_a_constraint_bars_tokens_place_by_place(temperature: float) -> None:
    constraint = Even()
    sampler = Sampler(SamplingParameters(temperature=temperature, seed=1, top_p=1), [], 0, constraint)
    told = [choose(sampler, logits_at(place)) for place in range(6)]
    assert sorted(token.id for token in told) == [0, 2, 4, 6, 8, 10]
    for place, token in enumerate(told):  # still the model's own
        assert token.logprob == pytest.approx(float(logits_at(place).log_softmax(-1)[token.id]), abs=1e-5)


def test_the_likeliest_tokens_come_with_their_log_probabilities() -> None:
    logits = logits_at(3)
    token = choose(Sampler(SamplingParameters(temperature=0, top_logprobs=3), []), logits)
    wanted = sorted(enumerate(logits.log_softmax(-1).tolist()), key=lambda pair: -pair[1])[:3]
    assert [id for id, _ in token.top] == [id for id, _ in wanted]
    assert [value for _, value in token.top] == pytest.approx([value for _, value in wanted], abs=1e-5)
    for _ in range(20):  # the same number, to the last bit
        token = choose(Sampler(SamplingParameters(temperature=0, top_logprobs=3), []), torch.rand(V))
        assert token.top[0] == (token.id, token.logprob)
    assert len(choose(Sampler(SamplingParameters(top_logprobs=99), []), logits).top) == V


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ModelDirectoryError, match="logits are not finite"):
        Sampler(SamplingParameters(), []).choose(logits_at(0), math.nan)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", 1.1),
        ("min_p", -0.1),
        ("presence_penalty", math.inf),
        ("frequency_penalty", "1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.nan),
        ("logit_bias", ((1, 2.0), (1, 3.0))),
        ("logit_bias", ((-1, 2.0),)),
        ("logit_bias", ((1, math.nan),)),
        ("logit_bias", [(1, 2.0)]),
        ("top_logprobs", -1),
        ("top_logprobs", True),
    ],
)
def test_parameters_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{field}=.*: must be"):
        SamplingParameters(**{field: value})  # type: ignore[arg-type]
