"""The sequence-wise balance loss against eq. 17-20 in loops, and its injection into the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abyssal.ops.balance_loss import balance_loss, inject_loss


def by_hand(scores: Tensor, top_k: int) -> Tensor:
    """Eq. 17-20 for one sequence [T, E], without alpha."""
    tokens, experts = scores.shape
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(experts):
        hits = 0
        share = torch.zeros((), dtype=torch.float64)
        for t in range(tokens):
            row = scores[t].tolist()
            hits += i in sorted(range(experts), key=lambda e, row=row: -row[e])[:top_k]
            share = share + scores[t, i] / sum(scores[t, 1:], scores[t, 0])  # eq. 19
        f = experts / (top_k * tokens) * hits  # eq. 18
        loss = loss + f * share / tokens  # eq. 17, 20
    return loss


@pytest.mark.parametrize("lengths", [(6,), (1, 4, 7), (3, 3), (5, 2)], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3), ids="seed{}".format)
def test_balance_loss_equals_the_definition(seed: int, top_k: int, lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(sum(lengths), 8, dtype=torch.float64, generator=generator, requires_grad=True)
    coefficients = torch.randn(len(lengths), dtype=torch.float64, generator=generator)
    losses = balance_loss(scores, lengths, top_k)
    expected = torch.stack([by_hand(part, top_k) for part in scores.split(lengths)])
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    (actual,) = torch.autograd.grad((losses * coefficients).sum(), scores)
    (oracle,) = torch.autograd.grad((expected * coefficients).sum(), scores)
    torch.testing.assert_close(actual, oracle, rtol=1e-9, atol=1e-9)


def test_perfect_balance_costs_one() -> None:
    scores = 0.1 + torch.eye(6, dtype=torch.float64)  # each token prefers an expert of its own
    torch.testing.assert_close(balance_loss(scores, (6,), 1), torch.ones(1, dtype=torch.float64))


def test_collapse_costs_more_than_balance() -> None:
    scores = torch.full((6, 4), 0.1, dtype=torch.float64)
    scores[:, 2] = 0.9
    assert balance_loss(scores, (6,), 1).item() == pytest.approx(4 * 0.9 / 1.2)


def test_a_sequence_without_tokens_costs_nothing() -> None:
    scores = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with_empty, without = balance_loss(scores, (2, 0, 3), 2), balance_loss(scores, (2, 3), 2)
    assert with_empty.tolist() == [without[0].item(), 0.0, without[1].item()]
    with_empty.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_injected_loss_leaves_the_value_and_adds_its_gradient() -> None:
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = inject_loss(x, (x**3).sum())
    assert torch.equal(y, x)
    (5 * y).sum().backward()
    torch.testing.assert_close(x.grad, 5 + 3 * x.detach() ** 2, rtol=1e-12, atol=0)


def test_injected_loss_counts_once_whatever_the_incoming_gradient() -> None:
    for factor in (0.0, 1.0, -7.0):
        x = torch.ones(4, dtype=torch.float64, requires_grad=True)
        (factor * inject_loss(x, 2 * x.sum())).sum().backward()
        torch.testing.assert_close(x.grad, torch.full((4,), factor + 2, dtype=torch.float64))


def test_injected_loss_survives_a_cut_of_the_graph() -> None:
    x = torch.ones(4, dtype=torch.float64, requires_grad=True)
    y = inject_loss(x, 2 * x.sum())
    border = y.detach().requires_grad_()
    (3 * border).sum().backward()
    y.backward(border.grad)
    torch.testing.assert_close(x.grad, torch.full((4,), 5.0, dtype=torch.float64))
