"""An exponential moving average of the weights, in fp32 on the CPU. Paper: §3.2.3."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class WeightAverage:
    """average <- average + (1 - d) * (weights - average) after every step, gate biases included.

    d = min(decay, (1 + step) / (10 + step)), so that a short run is not an average with its initial weights.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """Begin with the weights as they are."""
        self.decay = decay
        self.tensors = {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in weights.items()}

    def reset(self, weights: Mapping[str, Tensor]) -> None:
        """Begin again, in place."""
        for name, weight in weights.items():
            self.tensors[name].copy_(weight.detach())

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after `step`, in place."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in weights.items():
            self.tensors[name].lerp_(weight.detach().to("cpu", torch.float32), 1.0 - decay)
