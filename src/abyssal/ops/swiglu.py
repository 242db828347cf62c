"""SwiGLU's elementwise part: silu(gate) * up."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, elementwise; shapes and dtypes are equal and kept."""
    return F.silu(gate) * up
