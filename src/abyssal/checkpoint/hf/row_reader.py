"""Values out of safetensors files by plain reads: whole tensors into their places in memory, or some rows at a time.

A mapped file costs a page fault for every few pages, and a copy through it runs at half the speed of the system's own
read into the destination. A disk that fails, or a file that shrinks meanwhile, is a fault with a sentence here and not
the end of the process, and memory does not grow with what was read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from abyssal.checkpoint.hf.headers import DTYPES, TensorInfo
from abyssal.checkpoint.hf.mismatch import is_finite
from abyssal.errors import ModelDirectoryError
from abyssal.files.faults import os_faults

#: Bytes that one thread reads before another may take over.
CHUNK_BYTES = 2**22


def can_read_into(info: TensorInfo, place: Tensor) -> bool:
    """Whether a stored tensor can be read into `place` as it is: same type, contiguous, on the CPU."""
    return place.device.type == "cpu" and place.is_contiguous() and DTYPES.get(info.dtype) == place.dtype


def read_into(places: Mapping[str, Tensor], headers: Mapping[str, TensorInfo], threads: int) -> list[str]:
    """Fill each place with the stored tensor of its name; all are such that `can_read_into`.

    Each tensor is looked at for values that are not finite while the processor's cache still holds it.

    Returns:
        The names of those that hold a value that is not finite.

    Raises:
        ModelDirectoryError: a file cannot be read, or ends too early.
    """
    with ExitStack() as stack, ThreadPoolExecutor(threads) as pool:
        files = {}
        for path in sorted({headers[name].file for name in places}):
            with os_faults(ModelDirectoryError, path, "read the weights"):
                files[path] = stack.enter_context(FileIO(path))

        def fill(name: str) -> str | None:
            return None if _fill(places[name], headers[name], files[headers[name].file]) else name

        ordered = sorted(places, key=lambda name: (headers[name].file, headers[name].offset))
        return [name for name in pool.map(fill, ordered) if name is not None]


class RowReader:
    """Reads rows of tensors into a buffer that is used again: what it returned last is overwritten by the next read."""

    def __init__(self) -> None:
        """No file is open yet."""
        self._files: dict[Path, FileIO] = {}
        self._stack = ExitStack()
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Self:
        """Open files as they are needed."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close them."""
        self._stack.close()
        self._files.clear()

    def rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Return the rows start..stop of the tensor as a matrix, in the dtype of its file.

        Raises:
            ModelDirectoryError: the disk refused, or the file is shorter than its header said.
        """
        dtype, columns = DTYPES[info.dtype], info.matrix[1]
        size = (stop - start) * columns * dtype.itemsize
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        wanted = self._buffer[:size]
        if info.file not in self._files:
            with os_faults(ModelDirectoryError, info.file, "read the weights"):
                self._files[info.file] = self._stack.enter_context(FileIO(info.file))
        offset = info.offset + start * columns * dtype.itemsize
        _read(self._files[info.file], wanted.numpy().data, offset, info.file)
        return wanted.view(dtype).view(stop - start, columns)

    def whole(self, info: TensorInfo) -> Tensor:
        """Return all of a small tensor, in fp32 and in memory of its own."""
        return self.rows(info, 0, info.matrix[0]).to(torch.float32, copy=True).view(info.shape)


def _fill(place: Tensor, info: TensorInfo, file: FileIO) -> bool:
    """Read one tensor, and return whether it is finite."""
    flat = place.detach().view(-1)
    target = memoryview(flat.view(torch.uint8).numpy().data)
    finite = True
    for start in range(0, len(target), CHUNK_BYTES):
        part = target[start : start + CHUNK_BYTES]
        _read(file, part, info.offset + start, info.file)
        values = slice(start // place.itemsize, (start + len(part)) // place.itemsize)
        finite = is_finite(flat[values]) and finite
    return finite


def _read(file: FileIO, target: memoryview, offset: int, path: Path) -> None:
    """Fill `target` with the bytes of a file from `offset` on.

    Raises:
        ModelDirectoryError: the disk refused, or the file ends too early.
    """
    while target:
        with os_faults(ModelDirectoryError, path, "read the weights"):
            count = os.preadv(file.fileno(), [target], offset)
        if not count:
            raise ModelDirectoryError(f"{path}: ends too early; it became shorter while it was read, download it again")
        target, offset = target[count:], offset + count
