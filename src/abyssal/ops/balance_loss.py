"""The complementary sequence-wise balance loss, injected at the affinities.

Legend: T packed tokens, B sequences, E routed experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def balance_loss(scores: Tensor, lengths: Sequence[int], top_k: int) -> Tensor:
    """Return sum_i f_i P_i of each sequence, without the factor alpha.

    f_i counts how often expert i is among the best K by affinity alone (no bias, no groups), scaled so that balance
    gives 1; P_i is the mean share of expert i in a token's affinities. Only P carries a gradient.

    Args:
        scores: [T, E] affinities.
        lengths: tokens of each sequence; their sum is T.
        top_k: K.

    Returns:
        [B] in scores' dtype; 1 at perfect balance, 0 for a sequence without tokens.

    Paper: §2.1.2 eq. 17-20.
    """
    num_experts = scores.shape[-1]
    tokens = scores.new_tensor(lengths).clamp_min(1)[:, None]  # [B, 1]; empty sequences divide 0 by 1
    sequence = torch.repeat_interleave(
        torch.arange(len(lengths), device=scores.device),
        torch.tensor(lengths, device=scores.device),
        output_size=len(scores),
    )  # [T]; its size given, since reading it back would wait for the device
    chosen = torch.zeros_like(scores).scatter_(-1, scores.detach().topk(top_k, dim=-1).indices, 1.0)  # [T, E]
    zeros = scores.new_zeros(len(lengths), num_experts)
    f = zeros.index_add(0, sequence, chosen) * (num_experts / top_k) / tokens  # [B, E]  eq. 18
    shares = scores / scores.sum(-1, keepdim=True)  # eq. 19
    p = zeros.index_add(0, sequence, shares) / tokens  # [B, E]  eq. 20
    return (f * p).sum(-1)  # [B]  eq. 17


class _InjectLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())


def inject_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Return x unchanged; when a gradient comes back through it, the scalar `loss` is differentiated too.

    So an auxiliary loss needs no path of its own to the end of the network and survives any cut of the pipeline.
    """
    return _InjectLoss.apply(x, loss)  # type: ignore[no-any-return, no-untyped-call]
