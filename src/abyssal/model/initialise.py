"""Initial weights as a pure function of seed and name, whatever the layout or the order of construction."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from abyssal.model.transformer import Transformer


def generator_for(seed: int, name: str, index: int = 0) -> torch.Generator:
    """Return a CPU generator whose stream depends on these three alone."""
    digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> Transformer:
    """Fill every parameter in place: norms with 1, the balancing bias with 0, the rest from N(0, initializer_range).

    Each matrix, and each expert of a stack, draws in fp32 on the CPU from a generator of its own (`generator_for`), so
    every device and dtype, and whoever holds only some of the experts, starts from the same numbers. Stacks are taken
    to begin with expert 0. Paper: §4.2 (standard deviation 0.006).
    """
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        elif parameter.dim() == 2:
            parameter.copy_(normal(parameter, std, generator_for(seed, name)))
        else:
            for index, expert in enumerate(parameter):
                expert.copy_(normal(expert, std, generator_for(seed, name, index)))
    for buffer in model.buffers():
        buffer.zero_()
    return model


def normal(like: nn.Parameter | torch.Tensor, std: float, generator: torch.Generator) -> torch.Tensor:
    """Draw N(0, std) in `like`'s shape, fp32 on the CPU."""
    return torch.empty(like.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
