"""Which part of a tensor each rank holds, read from a DTensor's placements; a plain tensor is whole on every rank.

A DTensor is known by its mesh, since to import the class takes a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TensorShard:
    """What one rank holds of a tensor."""

    ranges: tuple[range, ...]  # of each dim
    copy: int = 0  # which of the tensor's equal copies it belongs to


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which other ranks may hold other parts."""
    return hasattr(tensor, "device_mesh")


def is_on_this_rank(tensor: Tensor) -> bool:
    """Whether this rank holds a part of it, be it an empty one, as the ranks of its mesh do."""
    distributed: Any = tensor
    return not is_distributed(tensor) or distributed.device_mesh.get_coordinate() is not None


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which shares its memory."""
    distributed: Any = tensor
    return distributed.to_local() if is_distributed(tensor) else tensor


def local_shard(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return this rank's part of a tensor, which shares its memory, detached, and where it begins along each dim."""
    if not is_distributed(tensor):
        return tensor.detach(), (0,) * tensor.dim()
    distributed: Any = tensor
    shard = shard_at(tensor, distributed.device_mesh.get_coordinate())
    part: Tensor = distributed.to_local().detach()
    assert part.shape == tuple(map(len, shard.ranges)), f"{distributed.placements}: {part.shape} is not {shard}"
    return part, tuple(held.start for held in shard.ranges)


def copies(tensor: Tensor) -> int:
    """Return on how many ranks each element of a tensor stands; 1 for a plain one."""
    if not is_distributed(tensor):
        return 1
    distributed: Any = tensor
    axes = zip(distributed.device_mesh.shape, distributed.placements, strict=True)
    return prod(size for size, placement in axes if placement.is_replicate())


def shard_by_rank(tensor: Tensor) -> dict[int, TensorShard]:
    """Return what each global rank of a DTensor's mesh holds, without communication.

    Raises:
        ValueError: see `shard_at`.
    """
    distributed: Any = tensor
    mesh: Tensor = distributed.device_mesh.mesh
    coordinates = product(*map(range, mesh.shape))
    return {rank: shard_at(tensor, at) for rank, at in zip(mesh.flatten().tolist(), coordinates, strict=True)}


def shard_at(tensor: Tensor, coordinate: Sequence[int]) -> TensorShard:
    """Return what the rank at a coordinate of a DTensor's mesh holds.

    Raises:
        ValueError: a placement is neither a whole copy nor a shard.
    """
    distributed: Any = tensor
    ranges, copy = [range(size) for size in tensor.shape], 0
    axes = list(zip(coordinate, distributed.device_mesh.shape, distributed.placements, strict=True))
    # FSDP's strided shard cuts what the other axes leave of that dim, so it comes last
    for index, size, placement in sorted(axes, key=lambda axis: hasattr(axis[2], "split_factor")):
        if placement.is_replicate():
            copy = copy * size + index
        elif hasattr(placement, "dim"):
            ranges[placement.dim] = chunk(ranges[placement.dim], size, index)
        else:
            raise ValueError(f"{placement}: neither a copy nor a shard")
    return TensorShard(tuple(ranges), copy)


def chunk(whole: range, number: int, index: int) -> range:
    """Return the part of `whole` that torch gives to shard `index` of `number`; the last ones may be short or empty."""
    size = -(-len(whole) // number)
    return whole[index * size : (index + 1) * size]
