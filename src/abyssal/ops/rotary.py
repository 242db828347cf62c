"""Rotary position embedding over interleaved pairs, the layout of the released weights.

Legend: T packed tokens, H heads, R rotary dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of each row by its token's angles.

    Args:
        x: [T, ..., R].
        cos: [T, R/2], one angle a pair; sin likewise.

    Returns:
        [T, ..., R], pairs still interleaved, in x's dtype; the products are taken in cos's dtype.

    Differs: transformers returns the two halves apart (the same dot products, another cache layout).
    """
    return _Rotate.apply(x, torch.complex(cos, sin))  # type: ignore[no-any-return, no-untyped-call]


class _Rotate(torch.autograd.Function):
    """A pair is a complex number, and turning the gradient back is its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor) -> Tensor:  # [T, ..., R], [T, R/2]
        ctx.save_for_backward(turn)
        return _turned(x, turn)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _turned(grad, ctx.saved_tensors[0].conj()), None


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Return (x0 + i x1) * turn for each pair of x."""
    turn = turn.view(x.shape[0], *[1] * (x.dim() - 2), turn.shape[-1])  # [T, 1..., R/2]
    wide = x.to(turn.real.dtype, copy=True, memory_format=torch.contiguous_format)  # complex views need even offsets
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * turn  # [T, ..., R/2]
    return torch.view_as_real(pairs).flatten(-2).to(x.dtype)  # [T, ..., R]
