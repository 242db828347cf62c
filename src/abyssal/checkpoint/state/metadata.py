"""DCP's `.metadata`: read without running what it says, and compared with the tensors that are to be filled."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from abyssal.checkpoint.state.local_shards import LocalShard

#: The most names that a sentence lists of one kind.
MAX_NAMES = 8


class _RecordsOnly(pickle.Unpickler):
    """An unpickler that knows the records DCP's metadata is made of, and no other class or function."""

    KNOWN = frozenset(
        {
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "Metadata",
                    "MetadataIndex",
                    "TensorStorageMetadata",
                    "ChunkStorageMetadata",
                    "BytesStorageMetadata",
                    "TensorProperties",
                    "StorageMeta",
                    "_MEM_FORMAT_ENCODING",
                )
            ),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no training state needs")
        return super().find_class(module, name)


def read_metadata(file: Path, files: Collection[str]) -> Metadata:
    """Read `.metadata`, and see that it speaks of tensors in `files` only.

    Raises:
        OSError: the disk refused.
        ValueError: it does not; says what it is instead.
    """
    try:
        with file.open("rb") as stream:
            metadata = _RecordsOnly(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        written = {info.relative_path for info in metadata.storage_data.values()}
    except OSError:
        raise
    except Exception as error:  # a hostile or damaged pickle may raise anything
        raise ValueError(f"not the metadata of a training state: {error}") from None
    if strangers := sorted(written - set(files)):
        raise ValueError(f"names {strangers[0]!r}, which is no file of this training state")
    return metadata


@dataclass(frozen=True)
class StateMismatch:
    """How what one rank holds differs from a state."""

    missing: frozenset[str]  # held, but not stored
    different: frozenset[str]  # stored as something else; says as what
    held: bytes  # of each stored name, in their order, whether it is held


def compare_with_metadata(metadata: Metadata, shards: Mapping[str, LocalShard]) -> StateMismatch:
    """Compare names, shapes and dtypes of what this rank holds with those of a state."""
    records = metadata.state_dict_metadata
    different = []
    for name in shards.keys() & records.keys():
        record, shard = records[name], shards[name]
        if not isinstance(record, TensorStorageMetadata):
            different.append(f"{name} (no tensor)")
        elif (record.size, record.properties.dtype) != (shard.shape, shard.tensor.dtype):
            stored = f"{list(record.size)} {record.properties.dtype}"
            different.append(f"{name} ({stored} instead of {list(shard.shape)} {shard.tensor.dtype})")
        elif sum(prod(chunk.sizes) for chunk in record.chunks) != record.size.numel():
            different.append(f"{name} (not the whole of it)")
    held = bytes(name in shards for name in sorted(records))
    plain = (sentence.replace("torch.", "") for sentence in different)
    return StateMismatch(frozenset(shards.keys() - records.keys()), frozenset(plain), held)


def describe_mismatches(metadata: Metadata, mismatches: Sequence[StateMismatch]) -> str | None:
    """Return a clause about what differs on any rank, none where nothing does."""
    stored = sorted(metadata.state_dict_metadata)
    surplus = {name for name, *held in zip(stored, *(each.held for each in mismatches), strict=True) if not any(held)}
    faults = {
        "missing": frozenset[str]().union(*(each.missing for each in mismatches)),
        "surplus": surplus,
        "of another shape or type": frozenset[str]().union(*(each.different for each in mismatches)),
    }
    return "; ".join(f"{kind}: {_list(sorted(names))}" for kind, names in faults.items() if names) or None


def _list(names: list[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
