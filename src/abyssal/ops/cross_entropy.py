"""Cross entropy from hidden states and the output head, without keeping the logits.

Legend: T packed tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition: -sum_t log softmax(hidden_t @ weight.T)[targets_t].

    Args:
        hidden: [T, D].
        weight: [V, D], the output head; cast to hidden's dtype.
        targets: [T] token ids.

    Returns:
        The sum over tokens, in nats, in at least fp32.
    """
    logits = F.linear(hidden, weight.to(hidden.dtype))  # [T, V]
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in chunks of tokens, so that at most VALUES logits exist at a time.

    The gradients are made in the forward pass, while the logits are there, and scaled in the backward. The softmax
    goes over a few rows at a time, so that its fp32 values stay in the cache.
    """

    ROWS, VALUES = 1024, 1 << 25  # tokens, and tokens times V, of a chunk at most
    SOFTMAX_VALUES = 1 << 18

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head = weight.to(hidden.dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        few = max(1, _ChunkedCrossEntropy.SOFTMAX_VALUES // weight.shape[0])
        rows = min(_ChunkedCrossEntropy.ROWS, max(1, _ChunkedCrossEntropy.VALUES // weight.shape[0]), len(hidden))
        buffer = hidden.new_empty(rows, weight.shape[0])  # written again by each chunk: a new one would fault each page
        for a in range(0, len(hidden), rows or 1):
            h, target = hidden[a : a + rows], targets[a : a + rows]
            logits = torch.mm(h, head.T, out=buffer[: len(h)])  # [rows, V], becomes its own gradient
            for part, t in zip(logits.split(few), target.split(few), strict=True):
                p = part.softmax(-1, dtype=wide)
                top = part.amax(-1, keepdim=True).to(wide)
                log_sum = top - p.amax(-1, keepdim=True).log_()  # the softmax has summed already: no second exp
                total += (log_sum - part.gather(1, t[:, None])).sum()
                if need_hidden or need_weight:
                    p.scatter_add_(1, t[:, None], p.new_full((1, 1), -1.0).expand(len(t), 1))
                    part.copy_(p)
            if d_hidden is not None:
                torch.mm(logits, head, out=d_hidden[a : a + len(h)])
            if d_weight is not None:
                d_weight += torch.mm(logits.T, h)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else (d_hidden * grad).to(d_hidden.dtype),
            None if d_weight is None else d_weight * grad,
            None,
        )


def chunked_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`linear_cross_entropy` in chunks of tokens; first derivatives only."""
    return _ChunkedCrossEntropy.apply(hidden.contiguous(), weight, targets)  # type: ignore[no-any-return, no-untyped-call]
