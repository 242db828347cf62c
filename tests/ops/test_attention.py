"""Attention against a loop over tokens and heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from abyssal.ops import attention as module
from abyssal.ops.attention import VERSIONS, Attention

Lengths = tuple[int, ...]
LENGTHS = [(7,), (4, 4, 4), (1, 5, 3), (2, 1), (1, 1, 1)]
#: Queries and positions of each sequence: several after a beginning, one, all, and all sequences alike.
OFFSETS = [((3,), (7,)), ((1,), (5,)), ((2, 4, 1), (6, 4, 3)), ((2, 2, 2), (5, 5, 5)), ((1, 1), (4, 4))]
CASES = [*((lengths, lengths) for lengths in LENGTHS), *OFFSETS]
WIDTHS = [(6, 3), (5, 5), (4, 7)]  # (query/key dims, value dims)
HEADS = 2


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few tokens be several blocks, the last of them not full."""
    monkeypatch.setattr(module._BlockedAttention, "ROWS", 3)


def by_hand(q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, k_lengths: Lengths, scale: float) -> Tensor:
    """Eq. 10, one query of one head at a time."""
    rows = []
    start = query = 0
    for t, s in zip(q_lengths, k_lengths, strict=True):
        for position in range(start + s - t, start + s):
            heads = []
            for i in range(q.shape[1]):
                scores = [scale * (q[query, i] * k[j, i]).sum() for j in range(start, position + 1)]
                largest = max(s.item() for s in scores)
                exponentials = [torch.exp(s - largest) for s in scores]
                total = sum(exponentials[1:], exponentials[0])
                parts = [e / total * v[j, i] for e, j in zip(exponentials, range(start, position + 1), strict=True)]
                heads.append(sum(parts[1:], parts[0]))
            rows.append(torch.stack(heads))
            query += 1
        start += s
    return torch.stack(rows)


def draw(
    seed: int, q_lengths: Lengths, k_lengths: Lengths, widths: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = sum(q_lengths), sum(k_lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    key_dims, value_dims = widths
    q, k, v = normal(queries, HEADS, key_dims), normal(keys, HEADS, key_dims), normal(keys, HEADS, value_dims)
    return q, k, v, normal(queries, HEADS, value_dims)


def run(
    kernel: Attention, inputs: tuple[Tensor, Tensor, Tensor, Tensor], q_lengths: Lengths, k_lengths: Lengths
) -> list[Tensor]:
    """Return the output and the three gradients."""
    *leaves, coefficients = inputs
    q, k, v = (x.clone().requires_grad_() for x in leaves)
    out = kernel(q, k, v, q_lengths, k_lengths, 1 / math.sqrt(q.shape[-1] + 1))
    return [out.detach(), *torch.autograd.grad((out * coefficients).sum(), (q, k, v))]


@pytest.mark.parametrize(("q_lengths", "k_lengths"), CASES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("kernel", VERSIONS, ids=lambda version: version.name)
def test_attention_equals_the_definition(
    kernel: Attention, widths: tuple[int, int], q_lengths: Lengths, k_lengths: Lengths
) -> None:
    inputs = draw(sum(q_lengths) + widths[0], q_lengths, k_lengths, widths)
    expected = run(by_hand, inputs, q_lengths, k_lengths)  # type: ignore[arg-type]
    for actual, oracle in zip(run(kernel, inputs, q_lengths, k_lengths), expected, strict=True):
        torch.testing.assert_close(actual, oracle, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", VERSIONS, ids=lambda version: version.name)
def test_large_scores_do_not_overflow(kernel: Attention) -> None:
    q, k, v, _ = draw(1, (6,), (6,), (4, 3))
    out = kernel(1e3 * q, 1e3 * k, v, (6,), (6,), 1.0)
    assert out.isfinite().all()


@pytest.mark.parametrize("scores", [1, 12, 100], ids="{} scores".format)
def test_blocks_have_as_many_rows_as_stay_in_the_cache_but_not_too_few(
    scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._BlockedAttention, "SCORES", scores)
    monkeypatch.setattr(module._BlockedAttention, "FEWEST", 2)
    q, k, _, _ = draw(2, (5,), (6,), (4, 3))
    blocks = [(rows, seen, p.shape[1]) for rows, seen, p in module._BlockedAttention.probabilities(q, k, 0.5)]
    size = {1: 2, 12: 2, 100: 3}[scores]
    assert [rows.start for rows, _, _ in blocks] == list(range(0, 5, size))
    assert all(seen == rows.stop + 1 and n == rows.stop - rows.start for rows, seen, n in blocks)
