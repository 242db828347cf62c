"""Where tensors stand in safetensors files, and their rows, read into a buffer that is used again.

Plain reads and no mapping into memory: a disk that fails, or a file that shrinks meanwhile, is then a fault with a
sentence and not the end of the process, and memory does not grow with what was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from abyssal.checkpoint.hf.headers import DTYPES, Header, value_offsets
from abyssal.errors import ModelDirectoryError
from abyssal.files.faults import os_faults


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in a file: its values begin at byte `offset`, row after row."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; what is no matrix counts as one column."""
        return (self.shape[0], self.shape[1]) if len(self.shape) == 2 else (prod(self.shape), 1)


def find_places(headers: Mapping[str, Header]) -> dict[str, Place]:
    """Return where the tensors of `headers`, which the safetensors library has checked, begin in their files.

    Raises:
        ModelDirectoryError: a file changed since.
    """
    found: dict[str, Place] = {}
    offsets = {}
    for file in dict.fromkeys(header.file for header in headers.values()):
        with os_faults(ModelDirectoryError, file, "read the weights"), file.open("rb") as stream:
            offsets[file] = value_offsets(stream)
    for name, header in headers.items():
        if name not in offsets[header.file]:
            raise ModelDirectoryError(f"{header.file}: changed while it was read; begin again")
        found[name] = Place(header.file, header.dtype, header.shape, offsets[header.file][name])
    return found


class PlaceReader:
    """Reads rows of tensors; what it returned last is overwritten by the next read."""

    def __init__(self) -> None:
        """No file is open yet."""
        self._files: dict[Path, FileIO] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Self:
        """Open files as they are needed."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close them."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def rows(self, place: Place, start: int, stop: int) -> Tensor:
        """Return the rows start..stop of the tensor as a matrix, in the dtype of its file.

        Raises:
            ModelDirectoryError: the disk refused, or the file is shorter than its header said.
        """
        dtype, columns = DTYPES[place.dtype], place.matrix[1]
        size = (stop - start) * columns * dtype.itemsize
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        wanted = self._buffer[:size]
        with os_faults(ModelDirectoryError, place.file, "read the weights"):
            if place.file not in self._files:
                self._files[place.file] = FileIO(place.file)  # without a buffer of its own
            file, target = self._files[place.file], wanted.numpy().data
            file.seek(place.offset + start * columns * dtype.itemsize)
            while target:
                count = file.readinto(target)
                if not count:
                    raise ModelDirectoryError(f"{place.file}: became shorter while it was read; download it again")
                target = target[count:]
        return wanted.view(dtype).view(stop - start, columns)

    def whole(self, place: Place) -> Tensor:
        """Return all of a small tensor, in fp32 and in memory of its own."""
        return self.rows(place, 0, place.matrix[0]).to(torch.float32, copy=True).view(place.shape)
