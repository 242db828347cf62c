"""RMSNorm: x / rms(x) * weight.

Shapes: [..., D] rows of width D.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row to unit root mean square, then by `weight`.

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
