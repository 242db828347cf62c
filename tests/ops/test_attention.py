"""Attention against a loop over tokens and heads, and its fast version against it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from abyssal.ops import attention as module
from abyssal.ops.attention import Attention, attention, blocked_attention, sdpa_attention

LENGTHS = [(7,), (4, 4, 4), (1, 5, 3), (2, 1), (1, 1, 1)]
WIDTHS = [(6, 3), (5, 5), (4, 7)]  # (query/key dims, value dims)
HEADS = 2


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few tokens and heads be several blocks, the last of each not full."""
    monkeypatch.setattr(module._BlockedAttention, "ROWS", 3)
    monkeypatch.setattr(module._BlockedAttention, "MATRICES", 4)


def by_hand(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """Eq. 10, one query of one head at a time."""
    rows = []
    start = 0
    for length in lengths:
        for t in range(start, start + length):
            heads = []
            for i in range(q.shape[1]):
                scores = [scale * (q[t, i] * k[j, i]).sum() for j in range(start, t + 1)]
                largest = max(s.item() for s in scores)
                exponentials = [torch.exp(s - largest) for s in scores]
                total = sum(exponentials[1:], exponentials[0])
                parts = [e / total * v[j, i] for e, j in zip(exponentials, range(start, t + 1), strict=True)]
                heads.append(sum(parts[1:], parts[0]))
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows)


def draw(seed: int, tokens: int, widths: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key_dims, value_dims = widths
    q, k = (torch.randn(tokens, HEADS, key_dims, dtype=torch.float64, generator=generator) for _ in range(2))
    v, coefficients = (torch.randn(tokens, HEADS, value_dims, dtype=torch.float64, generator=generator) for _ in "vc")
    return q, k, v, coefficients


def run(
    kernel: Attention, inputs: tuple[Tensor, Tensor, Tensor, Tensor], lengths: tuple[int, ...], dtype: torch.dtype
) -> list[Tensor]:
    """Return the output and the three gradients, in float64."""
    *leaves, coefficients = (x.to(dtype) for x in inputs)
    q, k, v = (x.requires_grad_() for x in leaves)
    out = kernel(q, k, v, lengths, 1 / math.sqrt(q.shape[-1] + 1))
    assert out.dtype == dtype
    gradients = torch.autograd.grad((out * coefficients).sum(), (q, k, v))
    assert all(g.dtype == dtype for g in gradients)
    return [x.detach().double() for x in (out, *gradients)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("kernel", [attention, sdpa_attention, blocked_attention])
def test_attention_equals_the_definition(kernel: Attention, widths: tuple[int, int], lengths: tuple[int, ...]) -> None:
    inputs = draw(sum(lengths) + widths[0], sum(lengths), widths)
    expected = run(by_hand, inputs, lengths, torch.float64)  # type: ignore[arg-type]
    for actual, oracle in zip(run(kernel, inputs, lengths, torch.float64), expected, strict=True):
        torch.testing.assert_close(actual, oracle, rtol=1e-9, atol=1e-9)


# bf16 keeps 8 bits; the products of this size add a few roundings of 2^-9 each
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("lengths", [(33,), (8, 8, 8), (3, 17, 9)], ids=str)
@pytest.mark.parametrize("kernel", [attention, sdpa_attention, blocked_attention])
def test_lower_precision_is_within_tolerance(
    kernel: Attention, lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    inputs = tuple(x.to(dtype).double() for x in draw(5, sum(lengths), (24, 16)))
    exact = run(attention, inputs, lengths, torch.float64)  # type: ignore[arg-type]
    for actual, oracle in zip(run(kernel, inputs, lengths, dtype), exact, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(actual, oracle, rtol=0, atol=tolerance * oracle.abs().max().item())


@pytest.mark.parametrize("kernel", [attention, sdpa_attention, blocked_attention])
def test_large_scores_do_not_overflow(kernel: Attention) -> None:
    q, k, v, _ = draw(1, 6, (4, 3))
    out = kernel(1e3 * q, 1e3 * k, v, (6,), 1.0)
    assert out.isfinite().all()


def test_blocked_attention_leaves_long_and_unequal_sequences_to_the_fused_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LONGEST", 5)
    q, k, v, _ = draw(1, 12, (4, 3))
    for lengths in ((6, 6), (5, 7)):
        assert torch.equal(blocked_attention(q, k, v, lengths, 0.5), sdpa_attention(q, k, v, lengths, 0.5))


def test_blocked_attention_at_its_real_block_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    inputs = draw(2, 2 * 170, (4, 3))
    for ours, definition in zip(
        run(blocked_attention, inputs, (170, 170), torch.float64),
        run(attention, inputs, (170, 170), torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(ours, definition, rtol=1e-9, atol=1e-9)
