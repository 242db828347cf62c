"""The weights of a model directory, written by every rank that holds some: its own rows, straight to their places.

No rank ever holds more of the model than it did, beside a block of converted rows. The bytes are those of one process,
which writes in the same way.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from abyssal.checkpoint.hf.expert_stacks import split_shard
from abyssal.checkpoint.hf.file_plan import PlannedFile, fill_files, row_blocks, write_index
from abyssal.checkpoint.hf.fp8_scales import SCALE_SUFFIX
from abyssal.checkpoint.hf.headers import DTYPES, FP8
from abyssal.checkpoint.hf.mismatch import is_finite
from abyssal.checkpoint.hf.released import mtp_copies, stored_tensors
from abyssal.config import ModelConfig
from abyssal.ops.block_fp8 import quantise_blocks, scale_rows
from abyssal.ranks.placements import local_shard

LETTERS = {dtype: letters for letters, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A tensor of the files; `dtype` in safetensors' letters."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def plan_weights(config: ModelConfig, dtype: torch.dtype, max_shard_bytes: int) -> list[PlannedFile[StoredWeight]]:
    """Return the files of a model directory in `dtype`, filled in the order of the release.

    Within a file the wider values come first, then the order is that of the names, as in safetensors' own writer.
    """
    weights = (StoredWeight(spec.name, spec.shape, LETTERS[stored]) for spec, stored in stored_tensors(config, dtype))
    return [
        PlannedFile(name, tuple(sorted(held, key=lambda weight: (-DTYPES[weight.dtype].itemsize, weight.name))))
        for name, held in fill_files(([weight] for weight in weights), max_shard_bytes)
    ]


def create_files(folder: Path, files: Sequence[PlannedFile[StoredWeight]]) -> None:
    """Create the files with their headers, as long as they will be, and their index; all values are zero still.

    Raises:
        OSError: the disk refused.
    """
    for file in files:
        with (folder / file.name).open("wb") as stream:
            stream.write(file.header())
            stream.truncate(file.nbytes)
    write_index(folder, files)


def write_weights(
    folder: Path, files: Sequence[PlannedFile[StoredWeight]], config: ModelConfig, tensors: Mapping[str, Tensor]
) -> list[str]:
    """Write what this rank holds of `tensors` into files that exist, converted a few rows at a time, and flush them.

    Returns:
        The names of the tensors in which a value is not finite, as it was written.

    Raises:
        OSError: the disk refused.
    """
    with _OpenFiles(folder, files) as opened:
        for name, tensor in tensors.items():
            shard, begin = local_shard(tensor)
            copies = mtp_copies(name, config)
            for released, first, rows in split_shard(name, tensor.shape, shard, begin):
                opened.write([released, *copies], first, rows)
    return opened.not_finite


class _OpenFiles:
    """The weight files of a folder, opened when something is written to them, and where each tensor stands in them."""

    def __init__(self, folder: Path, files: Iterable[PlannedFile[StoredWeight]]) -> None:
        self._folder = folder
        self._weights = {weight.name: weight for file in files for weight in file.tensors}
        self._offsets = {name: (file.name, offset) for file in files for name, offset in file.offsets().items()}
        self._open: dict[str, FileIO] = {}
        self._stack = ExitStack()
        self.not_finite: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flush to the disk what was written, and close the files."""
        with self._stack:
            if error is None:
                for file in self._open.values():
                    os.fsync(file.fileno())

    def write(self, names: Sequence[str], first: int, rows: Tensor) -> None:
        """Write rows of a tensor, from row `first` on, under each of some names; FP8 from a multiple of 128 on."""
        dtype = self._weights[names[0]].dtype
        finite = True
        for start, stop in row_blocks(len(rows), rows[:1].numel()):
            if dtype == FP8:
                values, scale = quantise_blocks(rows[start:stop])
                finite &= is_finite(scale)  # NaN for a block that holds what is not finite
                for name in names:
                    self._put(name + SCALE_SUFFIX, scale_rows(first + start, first + stop).start, scale)
            else:
                values = rows[start:stop].to("cpu", DTYPES[dtype])
                finite &= is_finite(values)
            for name in names:
                self._put(name, first + start, values)
        if not finite:
            self.not_finite.append(names[0])

    def _put(self, name: str, first: int, rows: Tensor) -> None:
        """Write rows that are as in the file, from row `first` on."""
        file, offset = self._offsets[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(FileIO(self._folder / file, "r+"))
        stream = self._open[file]
        data = rows.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        stream.seek(offset + first * prod(self._weights[name].shape[1:]) * rows.itemsize)
        while data:
            data = data[stream.write(data) :]
