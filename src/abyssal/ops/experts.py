"""The routed experts: a SwiGLU network each, over rows sorted by expert.

Legend: M rows, D hidden, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from abyssal.ops.version import Version, on_cpu

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


@dataclass(frozen=True)
class _Segment:
    """One expert's rows a..b, inside a window of rows whose number is a multiple of `ROUND`.

    The CPU's matrix library builds a kernel for every row count it has not met, and loads change at every step; so
    products are taken over the window, whose other rows belong to neighbours and are written again, or cleared.
    """

    expert: int
    a: int
    b: int
    start: int
    end: int

    ROUND: ClassVar[int] = 64

    def clear_neighbours(self, window: Tensor) -> Tensor:
        """Zero the rows of `window` [end - start, ...] that are not this expert's, in place."""
        window[: self.a - self.start].zero_()
        window[self.b - self.start :].zero_()
        return window

    def product(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Put rows a..b of left @ right into `out` [M, ...]; may spoil rows after b, which are written later."""
        if self.start == self.a:
            torch.mm(left, right, out=out[self.a : self.end])
        else:
            out[self.a : self.b] = torch.mm(left, right)[self.a - self.start : self.b - self.start]


def _segments(counts: Tensor) -> Iterator[_Segment]:
    """Yield the experts that have rows, in order; a window that would pass the last row starts earlier instead."""
    bounds = [0, *counts.cumsum(0).tolist()]
    for expert, (a, b) in enumerate(pairwise(bounds)):
        if a < b:
            size = min(-(-(b - a) // _Segment.ROUND) * _Segment.ROUND, bounds[-1])
            start = min(a, bounds[-1] - size)
            yield _Segment(expert, a, b, start, start + size)


class _SegmentedExperts(torch.autograd.Function):
    """One pass over the segments forward and one backward.

    Selecting an expert from the stack under autograd would make each of the E backward steps fill a gradient of the
    whole stack with zeros; here each expert's gradient is written once, into its slice. The SwiGLU output is not
    kept but computed again from the gate and up values. Paper: §3.3.3.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate_up, down = gate_up.to(rows.dtype), down.to(rows.dtype)
        segments = list(_segments(counts))
        pre = rows.new_empty(rows.shape[0], gate_up.shape[1])  # [M, 2F]
        out = torch.empty_like(rows)
        for s in segments:
            s.product(rows[s.start : s.end], gate_up[s.expert].T, out=pre)
        for s in segments:
            gate, up = pre[s.start : s.end].to(weights.dtype).chunk(2, -1)
            hidden = F.silu(gate).mul_(up).mul_(weights[s.start : s.end, None])
            s.product(hidden.to(rows.dtype), down[s.expert].T, out=out)
        ctx.save_for_backward(rows, weights, pre, gate_up, down)
        ctx.segments = segments
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        rows, weights, pre, gate_up, down = ctx.saved_tensors
        d_rows, d_weights = torch.empty_like(rows), torch.empty_like(weights)
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        idle = set(range(len(down))) - {s.expert for s in ctx.segments}
        for expert in idle:
            d_gate_up[expert].zero_()
            d_down[expert].zero_()
        for s in ctx.segments:
            window = slice(s.start, s.end)
            w, dy = weights[window, None], grad[window]
            gate, up = pre[window].to(weights.dtype).chunk(2, -1)
            activated = F.silu(gate)
            product = activated * up
            torch.mm(dy.T, s.clear_neighbours((product * w).to(rows.dtype)), out=d_down[s.expert])
            d_hidden = torch.mm(dy, down[s.expert]).to(weights.dtype)  # [m, F]
            d_weights[s.a : s.b] = product.mul_(d_hidden).sum(-1)[s.a - s.start : s.b - s.start]
            d_product = d_hidden.mul_(w)
            d_pre = torch.empty_like(pre[window])  # [m, 2F]
            d_gate, d_up = d_pre.chunk(2, -1)
            d_up.copy_(d_product * activated)
            d_gate.copy_(torch.ops.aten.silu_backward(d_product.mul_(up), gate))
            torch.mm(s.clear_neighbours(d_pre).T, rows[window], out=d_gate_up[s.expert])
            s.product(d_pre, gate_up[s.expert], out=d_rows)
        return d_rows, d_weights, None, d_gate_up, d_down


def segmented_expert_ffn(rows: Tensor, weights: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`expert_ffn` with a backward of its own, linear in the number of experts; first derivatives only."""
    return _SegmentedExperts.apply(  # type: ignore[no-any-return, no-untyped-call]
        rows.contiguous(), weights.contiguous(), counts, gate_up, down
    )


VERSIONS = (Version(segmented_expert_ffn, why_not=on_cpu), Version(expert_ffn))
