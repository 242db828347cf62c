"""Training states back into tensors, in any layout.

What is trusted: nothing that could run code. A state holds tensors only; DCP reads each with torch's weights-only
unpickler, its `.metadata` (a pickle) is read here by an unpickler that knows DCP's own record classes and nothing else,
and every file that the metadata names must be one of the folder's. The checksums find damage; they do not say who wrote
the files, since whoever changes a file can change its checksum too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from abyssal.checkpoint.state.dcp import ReadPlanner, dcp_faults
from abyssal.checkpoint.state.integrity import (
    METADATA,
    PROGRESS,
    READING,
    advice,
    check_file,
    check_state,
    read_checksums,
)
from abyssal.checkpoint.state.local_shards import LocalShard, local_shards
from abyssal.checkpoint.state.metadata import compare_with_metadata, describe_mismatches, read_metadata
from abyssal.errors import CheckpointError, DamagedStateError
from abyssal.files.faults import os_faults
from abyssal.ranks.ranks import Ranks


def load_state(path: Path, tensors: Mapping[str, Any], *, group: ProcessGroup | None = None) -> dict[str, Any]:
    """Load a state into `tensors`, in place, and return its progress.

    The tensors' layout may be another than that in which they were written, on more or fewer ranks. Every checksum, by
    one rank each, and every name, shape and dtype is compared before the first value is copied.

    Raises:
        CheckpointError: no such state, or names, shapes or dtypes that do not fit `tensors`.
        DamagedStateError: a file is not what was written.
    """
    shards, ranks = local_shards(tensors), Ranks(group)
    check_state(path, group=group)
    metadata = ranks.together(lambda: _metadata(path))
    mismatch = ranks.agree(
        lambda: compare_with_metadata(metadata, shards), lambda each: describe_mismatches(metadata, each)
    )
    if mismatch is not None:
        raise CheckpointError(
            f"{path}: this training state is of another model or optimizer; {mismatch}; "
            "resume with the recipe that it was written with"
        )
    ranks.together(lambda: _read(path, metadata, shards))
    return read_progress(path, group=group)


def read_progress(path: Path, *, group: ProcessGroup | None = None) -> dict[str, Any]:
    """Return the progress of a state without its tensors, its own checksum compared.

    Raises:
        CheckpointError: no such state.
        DamagedStateError: the file is not what was written.
    """

    def read() -> dict[str, Any]:
        with advice(path), os_faults(CheckpointError, path, READING):
            check_file(path, PROGRESS, read_checksums(path))
            progress: dict[str, Any] = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        return progress

    return Ranks(group).together(read)


def _metadata(path: Path) -> Metadata:
    file = path / METADATA
    with advice(path), os_faults(CheckpointError, path, READING):
        try:
            return read_metadata(file, read_checksums(path).keys())
        except ValueError as error:
            raise DamagedStateError(f"{file}: {error}") from None


def _read(path: Path, metadata: Metadata, shards: Mapping[str, LocalShard]) -> None:
    """Fill what this rank holds, in place."""
    planner, reader = ReadPlanner(shards, metadata), FileSystemReader(path)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    with dcp_faults(path, READING):
        reader.read_data(planner.create_local_plan(), planner).wait()
