"""The routed experts: a SwiGLU network each, over rows sorted by expert.

Legend: M rows, D hidden, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def expert_ffn(rows: Tensor, weights: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The definition: run each expert's rows through it; the routing weight multiplies before down_proj, in fp32.

    Args:
        rows: [M, D], sorted by expert.
        weights: [M], routing weights in at least fp32.
        counts: [E] int, rows of each expert; may be zero; their sum is M.
        gate_up: [E, 2F, D], gate above up.
        down: [E, D, F].

    Returns:
        [M, D] in rows' dtype, the weighted outputs.

    Paper: §2.1.2 eq. 12.
    """
    sizes = counts.tolist()
    outputs = []
    for expert, (x, w) in enumerate(zip(rows.split(sizes), weights.split(sizes), strict=True)):
        gate, up = F.linear(x, gate_up[expert].to(x.dtype)).to(weights.dtype).chunk(2, -1)  # [m, F] each
        hidden = (F.silu(gate) * up * w[:, None]).to(x.dtype)  # [m, F]
        outputs.append(F.linear(hidden, down[expert].to(x.dtype)))  # [m, D]
    return torch.cat(outputs)


class _SegmentedExperts(torch.autograd.Function):
    """One pass over the segments forward and one backward.

    Selecting an expert from the stack under autograd would make each of the E backward steps fill a gradient of the
    whole stack with zeros; here each expert's gradient is written once, into its slice. The SwiGLU output is not
    kept but computed again from the gate and up values. Paper: §3.3.3.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        bounds = [0, *counts.cumsum(0).tolist()]
        gate_up, down = gate_up.to(rows.dtype), down.to(rows.dtype)
        pre = rows.new_empty(rows.shape[0], gate_up.shape[1])  # [M, 2F]
        out = torch.empty_like(rows)
        for expert, (a, b) in enumerate(pairwise(bounds)):
            if a < b:
                torch.mm(rows[a:b], gate_up[expert].T, out=pre[a:b])
                gate, up = pre[a:b].to(weights.dtype).chunk(2, -1)
                hidden = F.silu(gate).mul_(up).mul_(weights[a:b, None])
                torch.mm(hidden.to(rows.dtype), down[expert].T, out=out[a:b])
        ctx.save_for_backward(rows, weights, pre, gate_up, down)
        ctx.bounds = bounds
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        rows, weights, pre, gate_up, down = ctx.saved_tensors
        d_rows, d_weights = torch.empty_like(rows), torch.empty_like(weights)
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        width = down.shape[-1]
        for expert, (a, b) in enumerate(pairwise(ctx.bounds)):
            if a == b:
                d_gate_up[expert].zero_()
                d_down[expert].zero_()
                continue
            w = weights[a:b, None]
            gate, up = pre[a:b].to(weights.dtype).chunk(2, -1)
            activated = F.silu(gate)
            product = activated * up
            dy = grad[a:b]
            torch.mm(dy.T, (product * w).to(rows.dtype), out=d_down[expert])
            d_hidden = torch.mm(dy, down[expert]).to(weights.dtype)  # [m, F]
            d_weights[a:b] = (d_hidden * product).sum(-1)
            d_product = d_hidden.mul_(w)
            d_pre = rows.new_empty(b - a, 2 * width)
            d_pre[:, width:] = d_product * activated
            d_pre[:, :width] = torch.ops.aten.silu_backward(d_product.mul_(up), gate)
            torch.mm(d_pre.T, rows[a:b], out=d_gate_up[expert])
            torch.mm(d_pre, gate_up[expert], out=d_rows[a:b])
        return d_rows, d_weights, None, d_gate_up, d_down


def segmented_expert_ffn(rows: Tensor, weights: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`expert_ffn` with a backward of its own, linear in the number of experts; first derivatives only."""
    return _SegmentedExperts.apply(  # type: ignore[no-any-return, no-untyped-call]
        rows.contiguous(), weights.contiguous(), counts, gate_up, down
    )
