"""The headers of a model directory's safetensors files: each tensor's type, shape and place; no values."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from abyssal.checkpoint.hf.files import INDEX, PICKLES, SINGLE
from abyssal.errors import ModelDirectoryError
from abyssal.files.faults import os_faults

#: Types in safetensors' letters.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
#: Types of weights; FP8 has scales beside it, `SCALES` are theirs.
READABLE = ("F64", "F32", "BF16", "F16", "F8_E4M3")
FP8 = "F8_E4M3"
SCALES = ("F32", "BF16", "F8_E8M0")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file's header says of one tensor: its values begin at byte `offset` of the file, row after row."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # in safetensors' letters (`BF16`)
    offset: int

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; what is no matrix counts as one column."""
        return (self.shape[0], self.shape[1]) if len(self.shape) == 2 else (prod(self.shape), 1)


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of all files of a model directory, in the order of the files; no tensor is read.

    Raises:
        ModelDirectoryError: no safetensors (or pickles in place of them), files missing, truncated or not safetensors,
            or an index that does not fit its files.
    """
    with os_faults(ModelDirectoryError, folder, "read the model directory"):
        files, placed = _files(folder)
        headers: dict[str, TensorInfo] = {}
        for file in files:
            for name, header in _file_headers(file).items():
                if placed is None or placed.get(name, file.name) == file.name:
                    headers[name] = header
    if placed is not None and (lost := placed.keys() - headers.keys()):
        name = min(lost)
        more = f", and {len(lost) - 1} more like it" if len(lost) > 1 else ""
        raise ModelDirectoryError(
            f"{folder / INDEX}: says that {printable(name)} is in {printable(placed[name])}, but it is not{more}"
        )
    return headers


def printable(name: str) -> str:
    """Return a name out of a file so that it can be printed: escaped where a damaged file made it unprintable."""
    return name if name.isprintable() else ascii(name)


def _files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the weight files, and, where there is an index, which file each tensor is in."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE], None
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles:
            raise ModelDirectoryError(
                f"{folder}: has weights only as {pickles[0]}, a pickle, which is refused because reading it can run "
                "code of whoever wrote it; convert it to safetensors"
            )
        raise ModelDirectoryError(f"{folder}: no {SINGLE} and no {INDEX}, so there are no weights to read")
    try:
        placed = {str(name): str(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelDirectoryError(f"{index}: not an index of safetensors files (no JSON with a weight_map)") from None
    names = sorted(set(placed.values()))
    for name in names:
        if Path(name).name != name:
            raise ModelDirectoryError(f"{index}: names {name!r}; a weight file must be in the same folder")
    if missing := [printable(name) for name in names if not (folder / name).is_file()]:
        raise ModelDirectoryError(
            f"{folder / missing[0]}: no such file, but {INDEX} names it"
            + (f", nor {', '.join(missing[1:])}" if missing[1:] else "")
            + "; download what is missing again"
        )
    return [folder / name for name in names], placed


def _file_headers(file: Path) -> dict[str, TensorInfo]:
    opened = open_safetensors(file)
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        entries = json.loads(stream.read(length))
    return {
        name: TensorInfo(file, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
        for name in opened.keys()  # noqa: SIM118 - not a mapping
        for entry in (entries[name],)
    }


def open_safetensors(file: Path) -> Any:
    """Open a safetensors file, which compares its header with its length."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        with file.open("rb") as stream:
            pointer = stream.read(24).startswith(b"version https://git-lfs")
        if pointer:
            raise ModelDirectoryError(f"{file}: a Git LFS pointer, not the weights; run git lfs pull") from None
        raise ModelDirectoryError(f"{file}: truncated, or not a safetensors file ({error})") from None
