"""What this rank holds of a tensor that is spread over ranks: a box of its values, and where the box begins."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from abyssal.model import Transformer, initialise


def local_shard(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the part of `tensor` that this rank holds, in its own memory, and where it begins along each dim.

    A plain tensor is whole. Of a DTensor each dim is split over one axis of its mesh at most, as `torch.chunk` splits:
    last shards may be shorter or empty. It is known by its mesh, since to import the class takes a second.
    """
    begin = [0] * tensor.dim()
    if not hasattr(tensor, "device_mesh"):
        return tensor.detach(), tuple(begin)
    spread: Any = tensor
    sharded: set[int] = set()
    for axis, placement in enumerate(spread.placements):
        if placement.is_replicate():
            continue
        assert placement.is_shard(), f"{spread.placements}: neither replicated nor sharded"
        assert placement.dim not in sharded, f"{spread.placements}: a dim over two axes"
        sharded.add(placement.dim)
        size = tensor.shape[placement.dim]
        step = -(-size // spread.device_mesh.size(axis))
        begin[placement.dim] = min(spread.device_mesh.get_local_rank(axis) * step, size)
    return spread.to_local().detach(), tuple(begin)


def fill_initial(model: Transformer, seed: int) -> Transformer:
    """Fill a model whose parameters may be DTensors with the initial weights of `seed`: each rank what it holds.

    The values are those of one process (`initialise`), to the bit. No rank waits for another.
    """
    return initialise(model, seed, local_shard)
