"""RMSNorm: x / rms(x) * weight.

Shapes: [..., D] rows of width D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from abyssal.ops.version import Version, decode_only, on_cpu, train_only

Normalise = Callable[[Tensor, Tensor, float], Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition: scale each row to unit root mean square, then by `weight`.

    Args:
        x: [..., D].
        weight: [D]; cast to x's dtype.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype; the mean square is accumulated in at least fp32.
    """
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return h.to(x.dtype) * weight.to(x.dtype)


def lean_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in fewer passes over memory; values only, no gradients."""
    return _lean(x, weight, eps)[0]


def _lean(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, the normed rows before the weight, and one factor a row [..., 1]."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    factor = mean_square.add_(eps).rsqrt_()
    normed = (h * factor).to(x.dtype)
    return normed * weight.to(x.dtype), normed, factor


class _DifferentiableRMSNorm(torch.autograd.Function):
    """Keeps the normed rows and one factor a row; from these the backward needs a third of autograd's passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, normed, factor = _lean(x, weight, eps)
        ctx.save_for_backward(normed, factor, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, factor, weight = ctx.saved_tensors
        wide, width = factor.dtype, normed.shape[-1]
        d_weight = (grad * normed).view(-1, width).sum(0, dtype=wide)
        d_normed = grad * weight.to(grad.dtype)
        along = (d_normed * normed).sum(-1, keepdim=True, dtype=wide).div_(width)  # what only lengthens the row
        d_x = torch.addcmul(d_normed.to(wide), normed.to(wide), along, value=-1.0).mul_(factor)
        return d_x.to(grad.dtype), d_weight, None


def differentiable_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`lean_rms_norm` with a backward of its own in fewer passes over memory; first derivatives only."""
    return _DifferentiableRMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


VERSIONS = (
    decode_only(lean_rms_norm, on_cpu),
    train_only(differentiable_rms_norm, on_cpu),
    Version(rms_norm),
)
