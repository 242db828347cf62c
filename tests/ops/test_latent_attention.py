"""Attention over cached latents against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from abyssal.ops import latent_attention as module
from abyssal.ops.latent_attention import VERSIONS, LatentAttention, PaddedLatents

HEADS, LATENT, ROPE, SCALE = 3, 5, 2, 0.37
KERNELS = pytest.mark.parametrize("kernel", VERSIONS, ids=lambda version: version.name)
#: (new, cached) tokens of each sequence: one that decodes, several, one with drafts or a prompt, and mixtures.
CASES = [
    ((1, 1),),
    ((1, 9),),
    ((1, 9), (1, 2), (1, 1)),
    ((4, 4),),
    ((3, 8),),
    ((3, 8), (1, 6), (2, 2)),
    ((1, 7), (2, 3)),
]


def draw(case: tuple[tuple[int, int], ...], seed: int) -> tuple[Tensor, ...]:
    """Return queries [T, H, C] and [T, H, R], and the cached rows [S, C+R] of each sequence."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    total = sum(new for new, _ in case)
    rows = [normal(cached, LATENT + ROPE) for _, cached in case]
    return normal(total, HEADS, LATENT), normal(total, HEADS, ROPE), *rows


def padded(rows: list[Tensor], rest: float) -> PaddedLatents:
    """Return the rows side by side, `rest` behind the end of each."""
    whole = torch.full((len(rows), 3 + max(map(len, rows)), LATENT + ROPE), rest, dtype=rows[0].dtype)
    for place, part in zip(whole, rows, strict=True):
        place[: len(part)] = part
    return PaddedLatents(whole, tuple(map(len, rows)))


@KERNELS
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("side_by_side", [False, True], ids=["list", "padded"])
def test_latent_attention_equals_sums_by_hand(
    side_by_side: bool, case: tuple[tuple[int, int], ...], kernel: LatentAttention
) -> None:
    q_latent, q_rope, *rows = draw(case, seed=len(case))
    cached = padded(rows, 1e9) if side_by_side else rows
    lengths = [new for new, _ in case]
    out = kernel(q_latent, q_rope, cached, lengths, SCALE)
    assert out.shape == q_latent.shape
    tokens = [(part, part.shape[0] - new + t + 1) for part, new in zip(rows, lengths, strict=True) for t in range(new)]
    for t, (part, seen) in enumerate(tokens):  # the newest token sees everything, the one before all but it
        for i in range(HEADS):
            query = torch.cat((q_latent[t, i], q_rope[t, i]))
            scores = [SCALE * float(query @ part[j]) for j in range(seen)]
            shares = [math.exp(s - max(scores)) for s in scores]
            expected = sum(share / sum(shares) * part[j, :LATENT] for j, share in enumerate(shares))
            torch.testing.assert_close(out[t, i], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scores", [1, 50, 200])
def test_a_prompt_in_blocks_equals_the_definition(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCORES", scores)
    q_latent, q_rope, *rows = draw(((7, 11), (5, 5)), seed=2)
    found, expected = (kernel(q_latent, q_rope, rows, [7, 5], SCALE) for kernel in VERSIONS)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_padded_latents_are_a_sequence_of_views() -> None:
    _, _, *rows = draw(((1, 4), (1, 1), (1, 6)), seed=0)
    both = padded(rows, 0.0)
    assert len(both) == 3
    for found, expected in zip(both, rows, strict=True):
        assert torch.equal(found, expected)
        assert found.untyped_storage().data_ptr() == both.rows.untyped_storage().data_ptr()
