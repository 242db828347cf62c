"""What a rank holds of each tensor of a training state, and DCP's plans for writing and reading that."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from abyssal.errors import CheckpointError, first_line
from abyssal.files.faults import explain
from abyssal.ranks.placements import is_distributed, is_on_this_rank, local_shard


@dataclass(frozen=True)
class Piece:
    """A rank's part of a tensor; the whole of one that is no DTensor."""

    path: tuple[str, ...]  # the keys of the nested dicts under which the tensor was found
    tensor: Tensor  # the part, a plain tensor
    shape: torch.Size  # of the whole
    offsets: torch.Size  # where the part begins in it
    sharded: bool  # a DTensor's: other ranks may hold other parts

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Where the part lies, in DCP's words."""
        return ChunkStorageMetadata(offsets=self.offsets, sizes=self.tensor.size())

    def digest(self) -> str:
        """Return what differs between parts of another shape, dtype or value: a text, no tensor."""
        values = self.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"{list(self.shape)} {self.tensor.dtype} {hashlib.sha256(values.data).hexdigest()}"


def leaves(tensors: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Yield (keys, tensor) of nested dicts; the keys joined by dots are the name in a training state.

    Raises:
        TypeError: a leaf is no tensor; other values belong into the progress.
    """
    for key, value in tensors.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, key))
        elif isinstance(value, Tensor):
            yield (*path, key), value
        else:
            name = ".".join((*path, key))
            raise TypeError(f"{name}: a training state holds tensors only, not {type(value).__name__}")


def pieces(tensors: Mapping[str, Any], *, copy: bool = False) -> dict[str, Piece]:
    """Return this rank's part of every tensor, by name.

    Args:
        tensors: nested dicts with tensors as leaves: DTensors on any mesh, or plain ones, which are equal on all ranks.
        copy: whether the parts are copies on the CPU, or share the tensors' memory.

    Raises:
        TypeError: a leaf is no tensor.
    """
    found = {}
    for path, tensor in leaves(tensors):
        if not is_on_this_rank(tensor):
            continue
        local, offsets = local_shard(tensor)
        if copy:
            local = local.to("cpu", copy=True)
        found[".".join(path)] = Piece(path, local, tensor.size(), torch.Size(offsets), is_distributed(tensor))
    return found


class WritePlanner(DefaultSavePlanner):
    """DCP's planner of a save, over pieces: what several ranks hold is written by one of them."""

    def __init__(self, held: Mapping[str, Piece]) -> None:
        """Plan to write what this rank holds."""
        super().__init__()
        self.held = held

    def create_local_plan(self) -> SavePlan:
        """Offer every piece; not the empty one of a rank for which no row was left."""
        offered = {name: piece for name, piece in self.held.items() if piece.tensor.numel() or not piece.shape.numel()}
        items = [_write_item(name, piece) for name, piece in offered.items()]
        return SavePlan(items, planner_data={name: piece.path for name, piece in self.held.items()})

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return what is written under an index."""
        return self.held[index.fqn].tensor


class ReadPlanner(DefaultLoadPlanner):
    """DCP's planner of a load, into pieces."""

    def __init__(self, held: Mapping[str, Piece], stored: Metadata) -> None:
        """Plan to read what this rank holds from where `stored` says it lies."""
        super().__init__()
        self.held, self.stored = held, stored

    def create_local_plan(self) -> LoadPlan:
        """Ask for every part of every piece."""
        items = []
        for name, piece in self.held.items():
            record = self.stored.state_dict_metadata[name]
            assert isinstance(record, TensorStorageMetadata)  # `fit` saw to it
            items += create_read_items_for_chunk_list(name, record, [piece.chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return what an index is read into."""
        return self.held[index.fqn].tensor


def _write_item(name: str, piece: Piece) -> WriteItem:
    properties = TensorProperties.create_from_tensor(piece.tensor)
    return WriteItem(
        index=MetadataIndex(name, piece.offsets),
        type=WriteItemType.SHARD if piece.sharded else WriteItemType.TENSOR,
        tensor_data=TensorWriteData(chunk=piece.chunk, properties=properties, size=piece.shape),
    )


@contextmanager
def dcp_faults(path: Path, doing: str) -> Iterator[None]:
    """Turn what DCP meets in the body into a CheckpointError, with the fault of the disk behind it if there is one."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        reason = first_line(error) if cause is None else explain(cause)
        raise CheckpointError(f"{path}: cannot {doing} ({reason})") from error
