"""What a rank holds of each tensor of a training state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abyssal.ranks.placements import is_distributed, is_on_this_rank, local_shard


@dataclass(frozen=True)
class LocalShard:
    """A rank's part of a tensor; the whole of one that is no DTensor."""

    path: tuple[str, ...]  # the keys of the nested dicts under which the tensor was found
    tensor: Tensor  # the part, a plain tensor
    shape: torch.Size  # of the whole
    offsets: torch.Size  # where the part begins in it
    is_distributed: bool  # other ranks may hold other parts

    def digest(self) -> str:
        """Return what differs between parts of another shape, dtype or value: a text, no tensor."""
        values = self.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"{list(self.shape)} {self.tensor.dtype} {hashlib.sha256(values.data).hexdigest()}"


def named_tensors(tensors: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Yield (keys, tensor) of nested dicts; the keys joined by dots are the name in a training state.

    Raises:
        TypeError: a leaf is no tensor; other values belong into the progress.
    """
    for key, value in tensors.items():
        if isinstance(value, Mapping):
            yield from named_tensors(value, (*path, key))
        elif isinstance(value, Tensor):
            yield (*path, key), value
        else:
            name = ".".join((*path, key))
            raise TypeError(f"{name}: a training state holds tensors only, not {type(value).__name__}")


def local_shards(tensors: Mapping[str, Any], *, copy: bool = False) -> dict[str, LocalShard]:
    """Return this rank's part of every tensor, by name.

    Args:
        tensors: nested dicts with tensors as leaves: DTensors on any mesh, or plain ones, which are equal on all ranks.
        copy: whether the parts are copies on the CPU, or share the tensors' memory.

    Raises:
        TypeError: a leaf is no tensor.
    """
    shards = {}
    for path, tensor in named_tensors(tensors):
        if not is_on_this_rank(tensor):
            continue
        local, offsets = local_shard(tensor)
        if copy:
            local = local.to("cpu", copy=True)
        shards[".".join(path)] = LocalShard(path, local, tensor.size(), torch.Size(offsets), is_distributed(tensor))
    return shards
