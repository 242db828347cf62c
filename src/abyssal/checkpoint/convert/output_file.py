"""One file of the output: its tensors read, converted and written a few rows at a time, hashed on the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from abyssal.checkpoint.convert.manifest import FileRecord
from abyssal.checkpoint.convert.plan import OutputFile, OutputTensor
from abyssal.checkpoint.hf.file_plan import row_blocks
from abyssal.checkpoint.hf.headers import DTYPES, FP8, TensorInfo
from abyssal.checkpoint.hf.mismatch import is_finite
from abyssal.checkpoint.hf.row_reader import RowReader
from abyssal.errors import ModelDirectoryError
from abyssal.files.atomic import atomic_file
from abyssal.files.checksums import HashingWriter
from abyssal.files.faults import os_faults
from abyssal.ops.block_fp8 import dequantise_blocks, quantise_blocks, requantise_blocks, scale_rows, scale_shape

#: Bytes after which the system is asked to begin writing to the disk, so that no long wait is left for the end.
WRITE_BEHIND = 2**25

#: Is told the bytes that were written since the last call.
OnWrite = Callable[[int], None]


def write_output_file(folder: Path, planned: OutputFile, on_write: OnWrite) -> FileRecord:
    """Write one file, flush it to the disk and give it its name; return its length and checksum.

    Raises:
        ModelDirectoryError: the disk refused, or a tensor is not finite.
    """
    path = folder / planned.name
    with (
        os_faults(ModelDirectoryError, path, "write the weights"),
        atomic_file(path) as staging,
        FileIO(staging, "w") as file,
        RowReader() as reader,
    ):
        output = _Output(file, on_write)
        output.write(planned.header())
        converter = _Converter(reader, planned.power_of_two)
        for target in planned.tensors:
            for rows in converter.rows(target):
                output.write(rows.reshape(-1).view(torch.uint8).numpy().data)
    return FileRecord(bytes=output.nbytes, sha256=output.sha256)


class _Output(HashingWriter):
    """A file that goes to the disk as it is written."""

    def __init__(self, file: FileIO, on_write: OnWrite) -> None:
        super().__init__(file)
        self._descriptor, self._on_write, self._flushed = file.fileno(), on_write, 0

    def write(self, data: bytes | memoryview) -> int:
        self._on_write(len(data))
        written = super().write(data)
        if self.nbytes - self._flushed >= WRITE_BEHIND and hasattr(os, "posix_fadvise"):
            # what is not needed again goes to the disk now; what has arrived there since leaves the system's cache
            begin = max(0, self._flushed - 4 * WRITE_BEHIND)
            os.posix_fadvise(self._descriptor, begin, self.nbytes - begin, os.POSIX_FADV_DONTNEED)
            self._flushed = self.nbytes
        return written


class _Converter:
    """The tensors of one file of the output, in rows; keeps the scales that it made until they are written."""

    def __init__(self, reader: RowReader, power_of_two: bool) -> None:
        self._reader, self._power_of_two = reader, power_of_two
        self._scales: dict[TensorInfo, Tensor] = {}  # fp32, by their weight

    def rows(self, target: OutputTensor) -> Iterator[Tensor]:
        """Yield the tensor in its new format, some rows at a time."""
        if target.is_scale:
            yield self._scale(target)
            self._scales.pop(target.weight, None)
        elif target.weight.dtype == FP8 != target.dtype:
            yield from self._dequantised(target)
        elif target.dtype == FP8 != target.weight.dtype:
            yield from self._quantised(target)
        else:
            for start, stop in row_blocks(*target.weight.matrix):
                rows = self._reader.rows(target.weight, start, stop).to(DTYPES[target.dtype])
                yield _finite(target, rows)

    def _dequantised(self, target: OutputTensor) -> Iterator[Tensor]:
        scale = self._scale(target)
        for start, stop in row_blocks(*target.weight.matrix):
            rows = self._reader.rows(target.weight, start, stop)
            yield _finite(target, dequantise_blocks(rows, scale[scale_rows(start, stop)], DTYPES[target.dtype]))

    def _quantised(self, target: OutputTensor) -> Iterator[Tensor]:
        known = target.scale is not None or target.weight in self._scales
        scale = self._scale(target) if known else torch.empty(scale_shape(target.shape))
        for start, stop in row_blocks(*target.weight.matrix):
            rows = self._reader.rows(target.weight, start, stop)
            blocks = scale_rows(start, stop)
            if known:
                values = requantise_blocks(rows, scale[blocks])
            else:
                values, scale[blocks] = quantise_blocks(rows, power_of_two=self._power_of_two)
            yield _finite(target, values, "is not finite, or too large for the given scales" if known else NOT_FINITE)
        self._scales[target.weight] = scale

    def _scale(self, target: OutputTensor) -> Tensor:
        """Return the scales of a weight: as they stand in a file, as made before, or made now."""
        if target.scale is not None:
            return self._reader.whole(target.scale)
        if target.weight not in self._scales:
            parts = [
                quantise_blocks(self._reader.rows(target.weight, *rows), power_of_two=self._power_of_two)[1]
                for rows in row_blocks(*target.weight.matrix)
            ]
            self._scales[target.weight] = torch.cat(parts)
        return self._scales[target.weight]


NOT_FINITE = "holds NaN or infinity"


def _finite(target: OutputTensor, values: Tensor, fault: str = NOT_FINITE) -> Tensor:
    """Return the values, of which none is NaN or infinite.

    Raises:
        ModelDirectoryError: one is; names the tensor.
    """
    if not is_finite(values):
        raise ModelDirectoryError(f"{target.weight.file}: {target.name} {fault}; nothing is written of a damaged model")
    return values
