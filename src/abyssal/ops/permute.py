"""Rows to experts and back: two permutations, each the other's backward.

Legend: T packed tokens, D hidden, K experts a token, M = T * K rows, n items of any number of rows each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def expert_order(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the (token, choice) pairs by expert, tokens of one expert in their own order.

    Args:
        experts: [T, K] indices.

    Returns:
        order [M]: which pair stands in each sorted row; inverse [M]: in which row each pair stands;
        counts [E]: rows of each expert.
    """
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    return order, inverse_order(order), count_experts(flat, num_experts)


def count_experts(experts: Tensor, num_experts: int) -> Tensor:
    """Return how many of the indices (any shape) name each expert: [num_experts]."""
    flat = experts.flatten()
    return flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))  # bincount waits for the device


def inverse_order(order: Tensor) -> Tensor:
    """Return where each element stands in a permutation [M]."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def sum_rows(rows: Tensor, places: Tensor, starts: Tensor) -> Tensor:
    """Add up the rows of each item, in fp32 or above inside, rounded once; without autograd.

    On a CPU a bf16 tie is rounded away from zero; in return the rows are read once and nothing is stored between.

    Args:
        rows: [M, D].
        places: [M] where the rows of the items stand, item after item.
        starts: [n] where each item begins in `places`; an item without rows sums to 0.

    Returns:
        [n, D] in rows' dtype.
    """
    return F.embedding_bag(places, rows, starts, mode="sum")


def _copy_rows(hidden: Tensor, order: Tensor, top_k: int) -> Tensor:
    return hidden.index_select(0, order // top_k)  # [M, D]


def _sum_token_rows(rows: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    return rows.index_select(0, inverse).view(-1, top_k, rows.shape[-1]).sum(1)  # [T, D]


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return _copy_rows(hidden, order, top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum_token_rows(grad, ctx.saved_tensors[0], ctx.top_k), None, None, None


class _FromExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return _sum_token_rows(rows, inverse, top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _copy_rows(grad, ctx.saved_tensors[0], ctx.top_k), None, None, None


def to_experts(hidden: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """Copy each token's row [T, D] to its K places in expert order: [M, D]."""
    return _ToExperts.apply(hidden, order, inverse, top_k)  # type: ignore[no-any-return, no-untyped-call]


def from_experts(rows: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """Add up the K rows of each token: [M, D] -> [T, D]; summed in fp32 inside, rounded once."""
    return _FromExperts.apply(rows, order, inverse, top_k)  # type: ignore[no-any-return, no-untyped-call]
