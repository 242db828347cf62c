"""torch.distributed.checkpoint (DCP) over local shards: its plans, its writer, its faults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from abyssal.checkpoint.state.local_shards import LocalShard
from abyssal.errors import CheckpointError, first_line
from abyssal.files.faults import explain


class WritePlanner(DefaultSavePlanner):
    """DCP's planner of a save: what several ranks hold is written by one of them."""

    def __init__(self, shards: Mapping[str, LocalShard]) -> None:
        """Plan to write what this rank holds."""
        super().__init__()
        self.shards = shards

    def create_local_plan(self) -> SavePlan:
        """Offer every shard; not the empty one of a rank for which no row was left."""
        offered = {name: s for name, s in self.shards.items() if s.tensor.numel() or not s.shape.numel()}
        items = [_write_item(name, shard) for name, shard in offered.items()]
        return SavePlan(items, planner_data={name: shard.path for name, shard in self.shards.items()})

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return what is written under an index."""
        return self.shards[index.fqn].tensor


class ReadPlanner(DefaultLoadPlanner):
    """DCP's planner of a load, into local shards."""

    def __init__(self, shards: Mapping[str, LocalShard], stored: Metadata) -> None:
        """Plan to read what this rank holds from where `stored` says it lies."""
        super().__init__()
        self.shards, self.stored = shards, stored

    def create_local_plan(self) -> LoadPlan:
        """Ask for all of every shard."""
        items = []
        for name, shard in self.shards.items():
            record = self.stored.state_dict_metadata[name]
            assert isinstance(record, TensorStorageMetadata)  # `compare_with_metadata` saw to it
            items += create_read_items_for_chunk_list(name, record, [_chunk(shard)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return what an index is read into."""
        return self.shards[index.fqn].tensor


class ReproducibleWriter(FileSystemWriter):
    """DCP's writer, which leaves out what differs between equal states: the path, a random name, an order by device."""

    def __init__(self, path: Path) -> None:
        """Write into `path`."""
        super().__init__(path, per_thread_copy_ahead=0)

    def storage_meta(self) -> StorageMeta:
        """Return nothing but the type."""
        return StorageMeta()


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


def _chunk(shard: LocalShard) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=shard.offsets, sizes=shard.tensor.size())


def _write_item(name: str, shard: LocalShard) -> WriteItem:
    properties = TensorProperties.create_from_tensor(shard.tensor)
    return WriteItem(
        index=MetadataIndex(name, shard.offsets),
        type=WriteItemType.SHARD if shard.is_distributed else WriteItemType.TENSOR,
        tensor_data=TensorWriteData(chunk=_chunk(shard), properties=properties, size=shard.shape),
    )
