"""Sorting rows by expert and bringing them back, against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abyssal.ops.permute import expert_order, from_experts, inverse_order, sum_rows, to_experts

TOKENS, HIDDEN, EXPERTS, TOP_K = 6, 4, 5, 3


def draw(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    return experts, torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("seed", range(4), ids="seed{}".format)
def test_order_sorts_by_expert_and_then_by_token(seed: int) -> None:
    experts, _ = draw(seed)
    order, inverse, counts = expert_order(experts, EXPERTS)
    pairs = [(e, t * TOP_K + k) for t, row in enumerate(experts.tolist()) for k, e in enumerate(row)]
    assert order.tolist() == [pair for _, pair in sorted(pairs)]
    assert [order[row].item() for row in inverse.tolist()] == list(range(TOKENS * TOP_K))
    assert counts.tolist() == [sum(e == i for e, _ in pairs) for i in range(EXPERTS)]


def test_counts_cover_experts_that_nobody_chose() -> None:
    _, _, counts = expert_order(torch.tensor([[0, 2]]), 7)
    assert counts.tolist() == [1, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(4), ids="seed{}".format)
def test_rows_go_out_and_come_back_as_in_a_loop(seed: int) -> None:
    experts, hidden = draw(seed)
    hidden.requires_grad_()
    order, inverse, _ = expert_order(experts, EXPERTS)
    rows = to_experts(hidden, order, inverse, TOP_K)
    by_hand = torch.stack([hidden[t] for e in range(EXPERTS) for t in range(TOKENS) if e in experts[t].tolist()])
    assert torch.equal(rows, by_hand)
    # each row times a number of its own, so that a row that lands on another token shows
    factors = torch.arange(1.0, len(order) + 1, dtype=torch.float64)[:, None]
    out = from_experts(rows * factors, order, inverse, TOP_K)
    expected = []
    for t in range(TOKENS):
        places = [r for r, pair in enumerate(order.tolist()) if pair // TOP_K == t]
        expected.append(sum((r + 1) * hidden[t] for r in places))
    oracle = torch.stack(expected)  # type: ignore[arg-type]
    torch.testing.assert_close(out, oracle, rtol=1e-12, atol=1e-12)
    coefficients = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (actual,) = torch.autograd.grad((out * coefficients).sum(), hidden)
    (gradient,) = torch.autograd.grad((oracle * coefficients).sum(), hidden)
    torch.testing.assert_close(actual, gradient, rtol=1e-12, atol=1e-12)


def test_both_permutations_have_the_gradient_of_finite_differences() -> None:
    experts, hidden = draw(9)
    order, inverse, _ = expert_order(experts, EXPERTS)
    rows = torch.randn(TOKENS * TOP_K, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    assert torch.autograd.gradcheck(lambda x: to_experts(x, order, inverse, TOP_K), hidden.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: from_experts(x, order, inverse, TOP_K), rows.requires_grad_())


def test_bfloat16_rows_are_summed_in_float32_and_rounded_once() -> None:
    """1 + 2^-9 rounds back to 1 in bf16, so adding 2^-9 eight times there never leaves 1."""
    values = torch.tensor([1.0] + [2.0**-9] * 8)
    rows = values[:, None].expand(9, HIDDEN).to(torch.bfloat16)
    order = inverse = torch.arange(9)
    out = from_experts(rows, order, inverse, 9)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.float(), torch.full((1, HIDDEN), 1.0 + 2.0**-6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(3), ids="seed{}".format)
def test_rows_of_each_item_are_summed_with_one_rounding(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [3, 0, 17, 1, 0, 4]
    rows = torch.randn(sum(sizes), HIDDEN, dtype=torch.float64, generator=generator).to(dtype)
    places = torch.randperm(sum(sizes), generator=generator)
    starts = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
    found = sum_rows(rows, places, starts)
    assert found.dtype == dtype
    inside = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for item, taken in enumerate(places.split(sizes)):
        picked = rows[taken].double()
        bound = torch.finfo(dtype).eps / 2 * picked.sum(0).abs() + 2 * len(taken) * inside * picked.abs().sum(0)
        assert ((found[item].double() - picked.sum(0)).abs() <= bound).all()


def test_no_rows_sum_to_nothing_and_items_without_rows_to_zero() -> None:
    none, three = torch.empty(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    assert sum_rows(torch.empty(0, HIDDEN), none, none).shape == (0, HIDDEN)
    assert torch.equal(sum_rows(torch.empty(0, HIDDEN), none, three), torch.zeros(3, HIDDEN))


def test_an_inverse_undoes_its_permutation() -> None:
    order = torch.randperm(23, generator=torch.Generator().manual_seed(4))
    assert torch.equal(order[inverse_order(order)], torch.arange(23))
