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
    """Loss and gradients chunk by chunk, so that only `rows` x V logits exist at a time.

    The gradients are made in the forward pass, while the logits are there, and scaled in the backward.
    """

    ROWS = 1024

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head = weight.to(hidden.dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for a in range(0, hidden.shape[0], _ChunkedCrossEntropy.ROWS):
            h, target = hidden[a : a + _ChunkedCrossEntropy.ROWS], targets[a : a + _ChunkedCrossEntropy.ROWS]
            logits = torch.mm(h, head.T).to(wide)  # [rows, V]
            log_p = F.log_softmax(logits, -1)
            total -= log_p.gather(1, target[:, None]).sum()
            if d_hidden is None and d_weight is None:
                continue
            d_logits = log_p.exp_()
            d_logits[torch.arange(len(target), device=target.device), target] -= 1.0
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, head, out=d_hidden[a : a + len(target)])
            if d_weight is not None:
                d_weight += torch.mm(d_logits.T, h)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else (d_hidden * grad).to(d_hidden.dtype),
            None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype),
            None,
        )


def chunked_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`linear_cross_entropy` in chunks of tokens; first derivatives only."""
    return _ChunkedCrossEntropy.apply(hidden.contiguous(), weight, targets)  # type: ignore[no-any-return, no-untyped-call]
