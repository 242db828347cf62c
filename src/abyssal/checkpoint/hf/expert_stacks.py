"""Experts are stacked in memory and stand one by one in the files: splitting and stacking, names and tensors alike.

Shapes: D hidden, E routed experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from abyssal.checkpoint.hf.names import TensorSpec

GATE_UP = ".mlp.experts.gate_up_proj"
DOWN = ".mlp.experts.down_proj"


def is_expert_stack(name: str) -> bool:
    """Whether `name` is a stack of experts, which a model directory holds one by one."""
    return name.endswith((GATE_UP, DOWN))


def split_names(name: str, num_experts: int) -> list[str]:
    """Return the released names that the in-memory tensor `name` stands for: of gate_up_proj, gate and up by turns."""
    if name.endswith(GATE_UP):
        prefix = name.removesuffix("gate_up_proj")
        return [f"{prefix}{e}.{kind}_proj.weight" for e in range(num_experts) for kind in ("gate", "up")]
    if name.endswith(DOWN):
        prefix = name.removesuffix("down_proj")
        return [f"{prefix}{e}.down_proj.weight" for e in range(num_experts)]
    return [name]


def split_shapes(name: str, shape: tuple[int, ...]) -> Iterator[TensorSpec]:
    """Yield the released names and shapes that the in-memory tensor `name` of `shape` stands for."""
    part = shape
    if name.endswith(GATE_UP):
        part = (shape[1] // 2, shape[2])
    elif name.endswith(DOWN):
        part = shape[1:]
    yield from (TensorSpec(released, part) for released in split_names(name, shape[0] if is_expert_stack(name) else 1))


def split_experts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (released name, view) of each expert in an in-memory stack; any other tensor as it is.

    Of `gate_up_proj` [E, 2F, D] the first F rows are the gate and the last F the up projection, [F, D] each; of
    `down_proj` [E, D, F] each expert is [D, F].
    """
    yield from ((released, rows) for released, _, rows in split_shard(name, tensor.shape, tensor, (0,) * tensor.dim()))


def split_shard(
    name: str, shape: Sequence[int], shard: torch.Tensor, begin: Sequence[int]
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield (released name, first row, view of rows) for what a shard of an in-memory tensor holds.

    Args:
        name: of the tensor in memory.
        shape: of the whole.
        shard: some experts and some of their rows, or some rows; rows are whole. It may be empty.
        begin: where in the whole it begins, along each dim.
    """
    assert shard.dim() < 2 or shard.shape[-1] == shape[-1], f"{name}: a row of {list(shape)} is split"
    if not is_expert_stack(name):
        yield name, begin[0], shard
        return
    parts = 2 if name.endswith(GATE_UP) else 1  # released tensors above one another in each matrix of the stack
    names, rows = split_names(name, shape[0]), shape[1] // parts
    for expert, matrix in enumerate(shard, begin[0]):
        for part in range(parts):  # the rows part * rows .. (part + 1) * rows of the whole matrix
            first = max(begin[1] - part * rows, 0)
            own = matrix[max(part * rows - begin[1], 0) : max((part + 1) * rows - begin[1], 0)]
            if len(own):
                yield names[parts * expert + part], first, own


def stack_experts(name: str, num_experts: int, part: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Return the in-memory tensor `name`, built from its released tensors, which `part` gives by name.

    The inverse of `split_experts`; a tensor that is no stack of experts comes back as `part` gave it.
    """
    if not is_expert_stack(name):
        return part(name)
    names = split_names(name, num_experts)
    first = part(names[0])
    halves = len(names) // num_experts
    stack = first.new_empty(num_experts, halves * first.shape[0], first.shape[1])  # [E, 2F, D] or [E, D, F]
    for view, released in zip(stack.view(len(names), *first.shape), names, strict=True):
        view.copy_(first if released == names[0] else part(released))
    return stack
