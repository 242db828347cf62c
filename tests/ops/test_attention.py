"""Attention against a loop over tokens and heads, and its fast version against it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from abyssal.ops import attention as module
from abyssal.ops.attention import Attention, attention, blocked_attention, sdpa_attention

Lengths = tuple[int, ...]
LENGTHS = [(7,), (4, 4, 4), (1, 5, 3), (2, 1), (1, 1, 1)]
#: Queries and positions of each sequence: several after a beginning, one, all, and all sequences alike.
OFFSETS = [((3,), (7,)), ((1,), (5,)), ((2, 4, 1), (6, 4, 3)), ((2, 2, 2), (5, 5, 5)), ((1, 1), (4, 4))]
CASES = [*((lengths, lengths) for lengths in LENGTHS), *OFFSETS]
WIDTHS = [(6, 3), (5, 5), (4, 7)]  # (query/key dims, value dims)
HEADS = 2


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few tokens and heads be several blocks, the last of each not full."""
    monkeypatch.setattr(module._BlockedAttention, "ROWS", 3)
    monkeypatch.setattr(module._BlockedAttention, "MATRICES", 4)


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
    kernel: Attention,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    q_lengths: Lengths,
    k_lengths: Lengths,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return the output and the three gradients, in float64."""
    *leaves, coefficients = (x.to(dtype) for x in inputs)
    q, k, v = (x.requires_grad_() for x in leaves)
    out = kernel(q, k, v, q_lengths, k_lengths, 1 / math.sqrt(q.shape[-1] + 1))
    assert out.dtype == dtype
    gradients = torch.autograd.grad((out * coefficients).sum(), (q, k, v))
    assert all(g.dtype == dtype for g in gradients)
    return [x.detach().double() for x in (out, *gradients)]


@pytest.mark.parametrize(("q_lengths", "k_lengths"), CASES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("kernel", [attention, sdpa_attention, blocked_attention])
def test_attention_equals_the_definition(
    kernel: Attention, widths: tuple[int, int], q_lengths: Lengths, k_lengths: Lengths
) -> None:
    inputs = draw(sum(q_lengths) + widths[0], q_lengths, k_lengths, widths)
    expected = run(by_hand, inputs, q_lengths, k_lengths, torch.float64)  # type: ignore[arg-type]
    for actual, oracle in zip(run(kernel, inputs, q_lengths, k_lengths, torch.float64), expected, strict=True):
        torch.testing.assert_close(actual, oracle, rtol=1e-9, atol=1e-9)


# bf16 keeps 8 bits; the products of this size add a few roundings of 2^-9 each
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [((33,), (33,)), ((8, 8, 8), (8, 8, 8)), ((3, 17, 9), (3, 17, 9)), ((5, 1), (31, 20))],
    ids=str,
)
@pytest.mark.parametrize("kernel", [attention, sdpa_attention, blocked_attention])
def test_lower_precision_is_within_tolerance(
    kernel: Attention, q_lengths: Lengths, k_lengths: Lengths, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = tuple(x.to(dtype).double() for x in draw(5, q_lengths, k_lengths, (24, 16)))
    exact = run(attention, inputs, q_lengths, k_lengths, torch.float64)  # type: ignore[arg-type]
    found = run(kernel, inputs, q_lengths, k_lengths, dtype)  # type: ignore[arg-type]
    for actual, oracle in zip(found, exact, strict=True):
        torch.testing.assert_close(actual, oracle, rtol=0, atol=tolerance * oracle.abs().max().item())


@pytest.mark.parametrize("kernel", [attention, sdpa_attention, blocked_attention])
def test_large_scores_do_not_overflow(kernel: Attention) -> None:
    q, k, v, _ = draw(1, (6,), (6,), (4, 3))
    out = kernel(1e3 * q, 1e3 * k, v, (6,), (6,), 1.0)
    assert out.isfinite().all()


def test_blocked_attention_leaves_long_and_unequal_sequences_to_the_fused_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LONGEST", 5)
    for q_lengths, k_lengths in (((6, 6), (6, 6)), ((5, 7), (5, 7)), ((3, 3), (5, 5))):
        q, k, v, _ = draw(1, q_lengths, k_lengths, (4, 3))
        outputs = [kernel(q, k, v, q_lengths, k_lengths, 0.5) for kernel in (blocked_attention, sdpa_attention)]
        assert torch.equal(*outputs)


def test_blocked_attention_at_its_real_block_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    inputs = draw(2, (170, 170), (170, 170), (4, 3))
    for ours, definition in zip(
        run(blocked_attention, inputs, (170, 170), (170, 170), torch.float64),
        run(attention, inputs, (170, 170), (170, 170), torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(ours, definition, rtol=1e-9, atol=1e-9)
