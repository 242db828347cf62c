"""The two smallest modules, which keep their weights in whatever precision they are stored and compute in x's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from abyssal.ops.linear import CastWeight, WeightGradients, linear
from abyssal.ops.rms_norm import Normalise, rms_norm
from abyssal.ops.version import Version


class Linear(nn.Module):
    """y = x W^T without a bias, computed in x's dtype; the seam where another precision is put in.

    `prepared` is the product with a weight that was made ready once, for a step or for good: cast, packed, quantised.
    Without, the weight is cast on use. So fp32 master weights train in bf16, and their gradient is accumulated in fp32.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        """Allocate W [out_features, in_features] without filling it; see `initialise`."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.prepared: Callable[[Tensor], Tensor] | None = None

    def prepare(self, dtype: torch.dtype, deferred: WeightGradients | None = None) -> None:
        """Cast the weight for all products until `prepared` is dropped; `deferred` takes its gradient's products."""
        self.prepared = CastWeight(self.weight, dtype, deferred)

    def prepare_for_good(self, version: Version, dtype: torch.dtype) -> None:
        """Let `version` lay the weight out as it reads it, for inference; what is stored is let go."""
        self.prepared = version.with_weight(self.weight, dtype)
        self.weight = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Map [T, in] to [T, out]."""
        return linear(x, self.weight.to(x.dtype)) if self.prepared is None else self.prepared(x)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, size: int, eps: float, kernel: Normalise = rms_norm) -> None:
        """Allocate the scale [size]; `kernel` is the version of the operation to run."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.kernel = eps, kernel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim of [..., size]."""
        return self.kernel(x, self.weight, self.eps)
