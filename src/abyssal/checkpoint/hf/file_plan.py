"""Safetensors files before they are written: which tensor goes into which file, and where its values stand there.

Names, shapes and dtypes say all of it, so that any number of writers can put values into their places in any order.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from abyssal.checkpoint.hf.files import INDEX, SINGLE
from abyssal.checkpoint.hf.headers import DTYPES
from abyssal.ops.block_fp8 import BLOCK

#: Values that are converted at once: few enough that they stay in the processor's cache, many enough for long writes.
BLOCK_VALUES = 2**21


class PlannedTensor(Protocol):
    """A tensor to be written; `dtype` in safetensors' letters (`BF16`)."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> str:
        """The type of its values."""


T = TypeVar("T", bound=PlannedTensor)


def stored_bytes(tensor: PlannedTensor) -> int:
    """Return the bytes of a tensor's values."""
    return prod(tensor.shape) * DTYPES[tensor.dtype].itemsize


@dataclass(frozen=True, slots=True)
class PlannedFile(Generic[T]):
    """One file, its tensors in the order of their values."""

    name: str
    tensors: tuple[T, ...]

    def header(self) -> bytes:
        """Return how the file begins: 8 bytes of length, then JSON that tells where each tensor stands.

        Byte for byte what safetensors' own writer makes of tensors in that order; the JSON is padded to 8 bytes.
        """
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for tensor, begin, end in self._placed():
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def offsets(self) -> dict[str, int]:
        """Return at which byte of the file the values of each tensor begin."""
        first = len(self.header())
        return {tensor.name: first + begin for tensor, begin, _ in self._placed()}

    @property
    def tensor_bytes(self) -> int:
        """The bytes of its tensors."""
        return sum(map(stored_bytes, self.tensors))

    @property
    def nbytes(self) -> int:
        """The length of the file."""
        return len(self.header()) + self.tensor_bytes

    def _placed(self) -> Iterator[tuple[T, int, int]]:
        """Yield each tensor with where its values begin and end, counted from the first value of the file."""
        begin = 0
        for tensor in self.tensors:
            end = begin + stored_bytes(tensor)
            yield tensor, begin, end
            begin = end


def fill_files(units: Iterable[Sequence[T]], max_bytes: int) -> list[tuple[str, list[T]]]:
    """Return the names of the files and what goes into each: as few files as `max_bytes` of tensors a file allow.

    A unit stays together, and the units stay in order; a single larger one gets a file of its own.
    """
    groups: list[list[T]] = [[]]
    filled = 0
    for unit in units:
        size = sum(map(stored_bytes, unit))
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1] += unit
        filled += size
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    return list(zip(names, groups, strict=True))


def write_index(folder: Path, files: Sequence[PlannedFile[Any]]) -> None:
    """Write which file holds which tensor, if there are several files.

    Raises:
        OSError: the disk refused.
    """
    if len(files) > 1:
        weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
        size = sum(file.tensor_bytes for file in files)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def write_json(path: Path, value: object) -> None:
    """Write a JSON file as people read it.

    Raises:
        OSError: the disk refused.
    """
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the rows to convert at a time: multiples of 128, about `BLOCK_VALUES` values."""
    step = max(BLOCK, BLOCK_VALUES // max(columns, 1) // BLOCK * BLOCK)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
