"""The routed experts: a SwiGLU network each, over rows sorted by expert.

Legend: M rows, D hidden, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from abyssal.ops.linear import Product, WeightGradients, cast_once, linear
from abyssal.ops.packed import pack_each, packed_expert_ffn, why_not_packed
from abyssal.ops.version import Version, decode_only, on_cpu

Experts = Callable[..., Tensor]


def expert_ffn(
    rows: Tensor,
    weights: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    deferred: WeightGradients | None = None,
) -> Tensor:
    """The definition: run each expert's rows through it; the routing weight multiplies before down_proj, in fp32.

    Args:
        rows: [M, D], sorted by expert.
        weights: [M], routing weights in at least fp32.
        counts: [E] int, rows of each expert; may be zero; their sum is M.
        gate_up: [E, 2F, D], gate above up; cast to rows' dtype.
        down: [E, D, F], likewise.
        deferred: where the backward pass leaves the weights' gradients; see `abyssal.ops.linear.linear`.

    Returns:
        [M, D] in rows' dtype, the weighted outputs.

    Paper: §2.1.2 eq. 12.
    """
    sizes = counts.tolist()
    outputs = []
    for expert, (x, w) in enumerate(zip(rows.split(sizes), weights.split(sizes), strict=True)):
        gate, up = linear(x, gate_up[expert].to(x.dtype), deferred).to(weights.dtype).chunk(2, -1)  # [m, F] each
        hidden = (F.silu(gate) * up * w[:, None]).to(x.dtype)  # [m, F]
        outputs.append(linear(hidden, down[expert].to(x.dtype), deferred))  # [m, D]
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


class _StackGradient:
    """The gradient dW [E, O, I] of a stack of weights, which comes expert by expert."""

    def __init__(self, stack: Tensor) -> None:
        """Begin without any expert's."""
        self.values = torch.empty_like(stack)
        self.idle = set(range(len(stack)))

    def add(self, expert: int, d_out: Tensor, x: Tensor) -> None:
        """Make that of `expert`, d_out^T x for rows [m, O] and [m, I]."""
        torch.mm(d_out.T, x, out=self.values[expert])
        self.idle.remove(expert)

    def finish(self) -> Tensor:
        """Return the whole, zero for experts without rows."""
        for expert in self.idle:
            self.values[expert].zero_()
        return self.values


class _DeferredStackGradient:
    """The same for later: what would be multiplied is kept, and a product that does it is put into a store."""

    def __init__(self, stack: Tensor, put: Callable[[Product], None]) -> None:
        """Begin without any expert's."""
        self.stack, self.put = stack, put
        self.factors: list[tuple[int, Tensor, Tensor]] = []

    def add(self, expert: int, d_out: Tensor, x: Tensor) -> None:
        """Keep the factors of an expert's gradient."""
        self.factors.append((expert, d_out, x))

    def finish(self) -> None:
        """Leave the whole for later."""
        self.put(self._product)

    def _product(self) -> Tensor:
        gradient = _StackGradient(self.stack)
        for factors in self.factors:
            gradient.add(*factors)
        return gradient.finish()


class _SegmentedExperts(torch.autograd.Function):
    """One pass over the segments forward and one backward.

    Selecting an expert from the stack under autograd would make each of the E backward steps fill a gradient of the
    whole stack with zeros; here each expert's gradient is written once, into its slice. The SwiGLU output is not
    kept but computed again from the gate and up values. Paper: §3.3.3.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, *puts: Any
    ) -> Tensor:
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
        ctx.segments, ctx.puts = segments, puts
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, weights, pre, gate_up, down = ctx.saved_tensors
        d_rows, d_weights = torch.empty_like(rows), torch.empty_like(weights)
        d_gate_up, d_down = (
            _StackGradient(stack) if put is None else _DeferredStackGradient(stack, put)
            for stack, put in zip((gate_up, down), ctx.puts, strict=True)
        )
        for s in ctx.segments:
            window = slice(s.start, s.end)
            w, dy = weights[window, None], grad[window]
            gate, up = pre[window].to(weights.dtype).chunk(2, -1)
            activated = F.silu(gate)
            product = activated * up
            d_down.add(s.expert, dy, s.clear_neighbours((product * w).to(rows.dtype)))
            d_hidden = torch.mm(dy, down[s.expert]).to(weights.dtype)  # [m, F]
            d_weights[s.a : s.b] = product.mul_(d_hidden).sum(-1)[s.a - s.start : s.b - s.start]
            d_product = d_hidden.mul_(w)
            d_pre = torch.empty_like(pre[window])  # [m, 2F]
            d_gate, d_up = d_pre.chunk(2, -1)
            d_up.copy_(d_product * activated)
            d_gate.copy_(torch.ops.aten.silu_backward(d_product.mul_(up), gate))
            d_gate_up.add(s.expert, s.clear_neighbours(d_pre), rows[window])
            s.product(d_pre, gate_up[s.expert], out=d_rows)
        return d_rows, d_weights, None, d_gate_up.finish(), d_down.finish(), None, None


def segmented_expert_ffn(
    rows: Tensor,
    weights: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    deferred: WeightGradients | None = None,
) -> Tensor:
    """`expert_ffn` with a backward of its own, linear in the number of experts; first derivatives only."""
    operands = rows.contiguous(), weights.contiguous(), counts
    if deferred is None or not rows.requires_grad:
        return _SegmentedExperts.apply(*operands, gate_up, down, None, None)  # type: ignore[no-any-return, no-untyped-call]
    puts = partial(deferred.put, gate_up), partial(deferred.put, down)
    return _SegmentedExperts.apply(*operands, gate_up.detach(), down.detach(), *puts)  # type: ignore[no-any-return, no-untyped-call]


class CastExperts:
    """Both stacks of a layer, cast once to the dtype of the products; called like a version of the operation."""

    def __init__(
        self,
        kernel: Experts,
        gate_up: Tensor,
        down: Tensor,
        dtype: torch.dtype,
        deferred: WeightGradients | None = None,
    ) -> None:
        """Prepare the stacks for `kernel`; see `abyssal.ops.linear.cast_once`."""
        self.kernel, self.deferred = kernel, deferred
        self.gate_up, self.down = cast_once(gate_up, dtype), cast_once(down, dtype)

    def __call__(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Map rows [M, D], sorted by expert, to their weighted outputs [M, D]."""
        return self.kernel(rows, weights, counts, self.gate_up, self.down, self.deferred)


VERSIONS = (
    decode_only(packed_expert_ffn, why_not_packed, prepare=pack_each),
    Version(segmented_expert_ffn, why_not=on_cpu),
    Version(expert_ffn),
)
