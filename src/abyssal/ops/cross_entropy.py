"""Log-probabilities and cross entropy from hidden states and the output head, without keeping the logits.

Legend: T packed tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from abyssal.ops.version import Version, decode_only, on_cpu, train_only


def log_probabilities(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition: log softmax(hidden_t @ weight.T)[targets_t] of each token.

    Args:
        hidden: [T, D].
        weight: [V, D], the output head; cast to hidden's dtype.
        targets: [T] token ids.

    Returns:
        [T] in nats, in at least fp32.
    """
    logits = F.linear(hidden, weight.to(hidden.dtype))  # [T, V]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.log_softmax(-1, dtype=wide).gather(1, targets[:, None])[:, 0]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None = None
) -> Tensor:
    """The definition: -sum_t w_t log softmax(hidden_t @ weight.T)[targets_t].

    Args:
        hidden: [T, D].
        weight: [V, D], the output head; cast to hidden's dtype.
        targets: [T] token ids.
        token_weights: [T], w: a mask, an advantage; constants, to which no gradient flows. None: 1 each.

    Returns:
        The sum over tokens, in nats, in at least fp32.
    """
    if token_weights is None:
        logits = F.linear(hidden, weight.to(hidden.dtype))  # [T, V]
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")
    return -(log_probabilities(hidden, weight, targets) * token_weights.detach()).sum()


class _Pass(NamedTuple):
    """What one pass over the logits gives; gradients are those of `loss`, None where they are not wanted."""

    log_probabilities: Tensor  # [T]
    loss: Tensor  # []
    d_hidden: Tensor | None  # [T, D]
    d_weight: Tensor | None  # [V, D] in at least fp32


ROWS, VALUES = 1024, 1 << 25  # tokens, and tokens times V, of a chunk at most: no more logits exist at a time
SOFTMAX_VALUES = 1 << 18  # the softmax goes over a few rows at a time, so that its fp32 values stay in the cache


def _pass_over_logits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    wanted: tuple[bool, bool] = (False, False),
) -> _Pass:
    """Go over the logits in chunks of tokens; the gradients are made while a chunk is there.

    `wanted`: the gradient of hidden, of weight.
    """
    hidden = hidden.contiguous()
    wide = torch.promote_types(hidden.dtype, torch.float32)
    head = weight.to(hidden.dtype)
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
    found = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    factors = None if token_weights is None else token_weights.to(wide)[:, None]  # [T, 1]
    few = max(1, SOFTMAX_VALUES // weight.shape[0])
    rows = min(ROWS, max(1, VALUES // weight.shape[0]), len(hidden))
    buffer = hidden.new_empty(rows, weight.shape[0])  # written again by each chunk: a new one would fault each page
    for a in range(0, len(hidden), rows or 1):
        h = hidden[a : a + rows]
        logits = torch.mm(h, head.T, out=buffer[: len(h)])  # [rows, V], becomes its own gradient
        for b in range(a, a + len(h), few):
            part, t = logits[b - a : b - a + few], targets[b : min(b + few, a + len(h)), None]
            tokens = slice(b, b + len(t))
            p = part.softmax(-1, dtype=wide)
            top = part.amax(-1, keepdim=True).to(wide)
            log_largest = p.amax(-1, keepdim=True).log_()  # the softmax has summed already: no second exp
            chosen = part.gather(1, t)
            found[tokens] = ((chosen - top) + log_largest)[:, 0]
            loss = (top - log_largest) - chosen  # [few, 1]
            total += loss.sum() if factors is None else (loss * factors[tokens]).sum()
            if any(wanted):
                p.scatter_add_(1, t, p.new_full((1, 1), -1.0).expand(len(t), 1))
                part.copy_(p if factors is None else p.mul_(factors[tokens]))
        if d_hidden is not None:
            torch.mm(logits, head, out=d_hidden[a : a + len(h)])
        if d_weight is not None:
            d_weight += torch.mm(logits.T, h)
    return _Pass(found, total, d_hidden, d_weight)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, while the logits are there, and scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None) -> Tensor:
        result = _pass_over_logits(hidden, weight, targets, token_weights, ctx.needs_input_grad[:2])
        ctx.save_for_backward(result.d_hidden, result.d_weight)
        return result.loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else (d_hidden * grad).to(d_hidden.dtype),
            None if d_weight is None else d_weight * grad,
            None,
            None,
        )


class _ChunkedLogProbabilities(torch.autograd.Function):
    """The backward makes the logits again: their gradient is that of a cross entropy weighted by what comes back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        return chunked_log_probabilities(hidden, weight, targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, targets = ctx.saved_tensors
        result = _pass_over_logits(hidden, weight, targets, -grad, ctx.needs_input_grad[:2])
        return result.d_hidden, result.d_weight, None


def chunked_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None = None
) -> Tensor:
    """`linear_cross_entropy` in chunks of tokens; first derivatives only."""
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, token_weights)  # type: ignore[no-any-return, no-untyped-call]


def chunked_log_probabilities(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`log_probabilities` in chunks of tokens; values only, no gradients."""
    return _pass_over_logits(hidden, weight, targets).log_probabilities


def differentiable_log_probabilities(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`log_probabilities` in chunks of tokens, forward and backward; first derivatives only."""
    return _ChunkedLogProbabilities.apply(hidden, weight, targets)  # type: ignore[no-any-return, no-untyped-call]


VERSIONS = (train_only(chunked_linear_cross_entropy, on_cpu), Version(linear_cross_entropy))
LOG_PROBABILITIES = (
    decode_only(chunked_log_probabilities, on_cpu),
    train_only(differentiable_log_probabilities, on_cpu),
    Version(log_probabilities),
)
