"""The gate against loops over tokens, groups and experts, written from eq. 13-16."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from abyssal.ops.routing import affinities, choose_experts, routing_weights

# (experts, groups, kept groups, K), all different where they can be
SHAPES = [(7, 1, 1, 3), (12, 4, 2, 5), (15, 5, 3, 4), (6, 2, 1, 3), (20, 10, 3, 6), (9, 3, 3, 2)]
TOKENS = 11


def chosen_by_hand(scores: list[float], bias: list[float], groups: int, kept: int, top_k: int) -> set[int]:
    """Eq. 16 within the best `kept` groups, each scored by the sum of its two largest biased affinities."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(biased) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    if groups > 1:
        by_score = sorted(members, key=lambda m: -sum(sorted(biased[i] for i in m)[-2:]))
        members = by_score[:kept]
    candidates = [i for m in members for i in m]
    return set(sorted(candidates, key=lambda i: -biased[i])[:top_k])


def draw(seed: int, experts: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(TOKENS, experts, dtype=torch.float64, generator=generator)
    bias = torch.randn(experts, dtype=torch.float64, generator=generator) * 0.4
    return scores, bias


@pytest.mark.parametrize("seed", range(6), ids="seed{}".format)
def test_affinities_are_sigmoids_of_dot_products(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    coefficients = torch.randn(5, 7, dtype=torch.float64, generator=generator)
    expected = torch.stack(
        [torch.stack([1 / (1 + torch.exp(-sum(u[d] * e[d] for d in range(3)))) for e in weight]) for u in hidden]
    )
    scores = affinities(hidden, weight)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    for actual, oracle in zip(
        torch.autograd.grad((scores * coefficients).sum(), (hidden, weight)),
        torch.autograd.grad((expected * coefficients).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(actual, oracle, rtol=1e-9, atol=1e-9)


def test_affinities_of_bfloat16_are_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 32, generator=generator).bfloat16()
    weight = torch.randn(5, 32, generator=generator)  # fp32 master weight, not to be rounded
    scores = affinities(hidden, weight)
    assert scores.dtype == torch.float32
    exact = (hidden.double() @ weight.double().T).sigmoid()
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, -3.0, 5.0], ids=["mixed", "all_negative", "near_5"])
@pytest.mark.parametrize("seed", range(4), ids="seed{}".format)
def test_choice_equals_the_definition(shape: tuple[int, int, int, int], offset: float, seed: int) -> None:
    experts, groups, kept, top_k = shape
    scores, bias = draw(seed, experts)
    bias = bias + offset
    chosen = choose_experts(scores, bias, n_group=groups, topk_group=kept, top_k=top_k)
    assert chosen.shape == (TOKENS, top_k)
    for token, row in zip(scores.tolist(), chosen.tolist(), strict=True):
        assert len(set(row)) == top_k
        assert set(row) == chosen_by_hand(token, bias.tolist(), groups, kept, top_k)


def test_dropped_groups_lose_even_against_negative_scores() -> None:
    """With a mask of 0 instead of -inf the dropped third group would win here."""
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.1, 0.2]], dtype=torch.float64)
    bias = torch.full((6,), -2.0, dtype=torch.float64)
    chosen = choose_experts(scores, bias, n_group=3, topk_group=2, top_k=3)
    assert set(chosen[0].tolist()) == {0, 1, 2}


def test_a_group_is_scored_by_its_best_two() -> None:
    """By its maximum the first group would win, by its sum of all three too."""
    scores = torch.tensor([[0.95, 0.30, 0.29, 0.70, 0.65, 0.01]], dtype=torch.float64)
    chosen = choose_experts(scores, torch.zeros(6, dtype=torch.float64), n_group=2, topk_group=1, top_k=1)
    assert chosen.tolist() == [[3]]


def test_bias_moves_the_choice_and_not_the_weights() -> None:
    scores = torch.tensor([[0.5, 0.4, 0.3, 0.2]], dtype=torch.float64)
    bias = torch.tensor([0.0, -1.0, 0.0, 1.0], dtype=torch.float64)
    chosen = choose_experts(scores, bias, n_group=1, topk_group=1, top_k=2)
    assert set(chosen[0].tolist()) == {0, 3}
    weights = routing_weights(scores, torch.tensor([[0, 3]]), normalise=True, scale=2.5)
    torch.testing.assert_close(weights, torch.tensor([[2.5 * 0.5 / 0.7, 2.5 * 0.2 / 0.7]], dtype=torch.float64))


def test_a_common_offset_of_the_bias_changes_nothing() -> None:
    scores, bias = draw(3, 12)
    limits = {"n_group": 4, "topk_group": 2, "top_k": 5}
    plain, shifted = choose_experts(scores, bias, **limits), choose_experts(scores, bias + 5.0, **limits)
    assert torch.equal(plain.sort(-1).values, shifted.sort(-1).values)


def test_choice_carries_no_gradient() -> None:
    scores, bias = draw(0, 12)
    chosen = choose_experts(scores.requires_grad_(), bias.requires_grad_(), n_group=4, topk_group=2, top_k=5)
    assert not chosen.requires_grad


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("seed", range(5), ids="seed{}".format)
def test_weights_equal_the_definition(normalise: bool, seed: int) -> None:
    scores, _ = draw(seed, 9)
    scores.requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    experts = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(TOKENS)])
    coefficients = torch.randn(TOKENS, 4, dtype=torch.float64, generator=generator)
    scale = 2.5
    expected = []
    for t in range(TOKENS):
        total = sum((scores[t, i] for i in experts[t].tolist()), torch.zeros((), dtype=torch.float64))
        for i in experts[t].tolist():
            expected.append(scale * scores[t, i] / (total + 1e-20 if normalise else 1))
    oracle = torch.stack(expected).view(TOKENS, 4)
    weights = routing_weights(scores, experts, normalise=normalise, scale=scale)
    torch.testing.assert_close(weights, oracle, rtol=1e-9, atol=1e-9)
    (actual,) = torch.autograd.grad((weights * coefficients).sum(), scores)
    (gradient,) = torch.autograd.grad((oracle * coefficients).sum(), scores)
    torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-9)
    if normalise:
        assert all(math.isclose(total, scale, rel_tol=1e-12) for total in weights.sum(-1).tolist())


def test_weights_of_vanishing_affinities_stay_finite() -> None:
    weights = routing_weights(torch.zeros(2, 5), torch.tensor([[0, 1], [3, 4]]), normalise=True, scale=2.5)
    assert torch.equal(weights, torch.zeros(2, 2))
