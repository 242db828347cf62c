"""Rotary position embedding over interleaved pairs, the layout of the released weights.

Legend: T packed tokens, H heads, R rotary dims.
"""

from __future__ import annotations

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
    shape = (x.shape[0], *[1] * (x.dim() - 2), cos.shape[-1])  # [T, 1..., R/2]
    cos, sin = cos.view(shape), sin.view(shape)
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)  # [T, ..., R/2, 2]
    return rotated.flatten(-2).to(x.dtype)  # [T, ..., R]
