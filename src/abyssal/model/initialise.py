"""Initial weights as a pure function of seed and name, whatever the layout or the order of construction."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from abyssal.model.transformer import Transformer

#: What is held here of a tensor, memory that can be written to, and where in the whole it begins, along each dim.
Held = tuple[Tensor, tuple[int, ...]]


def generator_for(seed: int, name: str, index: int = 0) -> torch.Generator:
    """Return a CPU generator whose stream depends on these three alone."""
    digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def whole(tensor: Tensor) -> Held:
    """Hold all of a tensor."""
    return tensor, (0,) * tensor.dim()


@torch.no_grad()
def initialise(model: Transformer, seed: int, held: Callable[[Tensor], Held] = whole) -> Transformer:
    """Fill every parameter in place: norms with 1, the balancing bias with 0, the rest from N(0, initializer_range).

    Each matrix, and each expert of a stack, draws in fp32 on the CPU from a generator of its own (`generator_for`), so
    every device, dtype and layout starts from the same numbers. Where `held` says that only a part of a parameter is
    here, that part is filled with what the whole would have there: experts that are elsewhere are not drawn, and of a
    matrix all is drawn, since a generator's later numbers do not come without its earlier ones.
    Paper: §4.2 (standard deviation 0.006).
    """
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        values, begin = held(parameter)
        if parameter.dim() == 1:
            values.fill_(1.0)
            continue
        stack, first = (values, begin[0]) if parameter.dim() == 3 else (values[None], 0)  # [E, A, B]
        if stack.numel() == 0:  # a last shard may be empty
            continue
        for index, matrix in enumerate(stack, first):
            drawn = normal(parameter.shape[-2:], std, generator_for(seed, name, index))
            matrix.copy_(drawn.narrow(0, begin[-2], matrix.shape[0]).narrow(1, begin[-1], matrix.shape[1]))
    for buffer in model.buffers():
        held(buffer)[0].zero_()
    return model


def normal(shape: torch.Size, std: float, generator: torch.Generator) -> Tensor:
    """Draw N(0, std) in a shape, fp32 on the CPU."""
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
