"""Auxiliary-loss-free load balancing: the bias of each expert moves against its load. Paper: §2.1.2.

Legend: E routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from abyssal.model import Transformer


def add_loads(total: dict[int, Tensor], part: Mapping[int, Tensor]) -> None:
    """Add the expert loads of one micro-batch, layer by layer, to those of the batch."""
    for layer, load in part.items():
        total[layer] = total[layer] + load if layer in total else load


@torch.no_grad()
def update_biases(model: Transformer, loads: Mapping[int, Tensor], speed: float) -> None:
    """Raise the bias of underloaded experts by `speed` and lower that of overloaded ones, in place.

    Args:
        loads: for each MoE layer, MTP layers included, the tokens sent to each expert [E] in the whole batch.
        speed: gamma; a load equal to the mean leaves its bias.
    """
    for layer, load in loads.items():
        bias = model.get_buffer(f"model.layers.{layer}.mlp.gate.e_score_correction_bias")
        load = load.to(torch.float64)
        bias += speed * torch.sign(load.mean() - load).to(bias)


def max_violation(loads: Mapping[int, Tensor]) -> float:
    """Return MaxVio, (max load - mean load) / mean load, averaged over layers; 0 is perfect balance."""
    if not loads:
        return 0.0
    violations = [(load.max() / load.to(torch.float64).mean()).item() - 1.0 for load in loads.values()]
    return sum(violations) / len(violations)
