"""What a conversion will write: every tensor of the output with its place in the input, file by file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from abyssal.checkpoint.hf.file_plan import PlannedFile, fill_files, stored_bytes
from abyssal.checkpoint.hf.fp8_scales import SCALE_SUFFIX, is_quantised
from abyssal.checkpoint.hf.headers import DTYPES, FP8, TensorInfo
from abyssal.checkpoint.hf.names import BIAS
from abyssal.ops.block_fp8 import scale_shape

Format = Literal["bf16", "fp8", "fp32"]
#: What tensors outside the FP8 layers are written in.
PLAIN: dict[Format, str] = {"bf16": "BF16", "fp8": "BF16", "fp32": "F32"}
#: What keeps fp32 in every format.
FLOAT32 = (BIAS, "rotary_emb.inv_freq")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What the user asked for.

    `power_of_two` scales are those of `scale_fmt` ue8m0; without `mtp` the MTP layers are left out.
    """

    to: Format
    max_shard_bytes: int = 5_000_000_000
    mtp: bool = True
    power_of_two: bool = False


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output: a weight, or (`is_scale`) the scales of one.

    `weight` is where the weight stands in the input, `scale` the scales to use with it: those of an FP8 weight, or
    those that are kept for a weight that becomes FP8.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    weight: TensorInfo
    scale: TensorInfo | None
    is_scale: bool = False


@dataclass(frozen=True, slots=True)
class OutputFile(PlannedFile[OutputTensor]):
    """One file of the output."""

    power_of_two: bool


def plan_files(
    names: Iterable[str],
    tensors: Mapping[str, TensorInfo],
    kept_scales: Mapping[str, TensorInfo],
    conversion: Conversion,
) -> list[OutputFile]:
    """Return the files to write.

    Args:
        names: the weights to write, in order, without scales.
        tensors: the weights and scales of the input.
        kept_scales: scales that are to be used again, by their names; they may be none.
        conversion: what was asked for.
    """
    units = (_output_tensors(name, tensors, kept_scales, conversion) for name in names)
    return [
        OutputFile(file, tuple(sorted(targets, key=_order)), conversion.power_of_two)
        for file, targets in fill_files(units, conversion.max_shard_bytes)
    ]


def plan_digest(files: Iterable[OutputFile]) -> str:
    """Return what changes when something else is to be written, or the same from other places."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(file.header())
        for target in file.tensors:
            whole.update(f"{target.weight}{target.scale}{target.is_scale}{file.power_of_two}\n".encode())
    return whole.hexdigest()


def _output_tensors(
    name: str, tensors: Mapping[str, TensorInfo], kept_scales: Mapping[str, TensorInfo], conversion: Conversion
) -> list[OutputTensor]:
    """Return what the weight `name` becomes: itself, in FP8 with its scales behind it."""
    weight, scale = tensors[name], tensors.get(name + SCALE_SUFFIX)
    if name.endswith(FLOAT32):
        return [OutputTensor(name, "F32", weight.shape, weight, scale)]
    if conversion.to != "fp8" or not is_quantised(name):
        return [OutputTensor(name, PLAIN[conversion.to], weight.shape, weight, scale)]
    if weight.dtype != FP8:
        scale = kept_scales.get(name + SCALE_SUFFIX)
    shape = scale_shape(weight.shape)
    return [
        OutputTensor(name, FP8, weight.shape, weight, scale),
        OutputTensor(name + SCALE_SUFFIX, "F32", shape, weight, scale, is_scale=True),
    ]


def _order(target: OutputTensor) -> tuple[int, int]:
    """Return the sorting key within a file: what keeps 4-byte values aligned, weights before their scales.

    First everything of a multiple of 4 bytes but scales, as planned; then scales, so that quantising a weight of the
    usual size comes before writing its scales; then the odd rest, the wider values first.
    """
    if target.is_scale:
        return 1, 0
    return (0, 0) if stored_bytes(target) % 4 == 0 else (2, -DTYPES[target.dtype].itemsize)
