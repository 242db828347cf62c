"""What a conversion will write: every tensor of the output with its place in the input, file by file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from abyssal.checkpoint.convert.places import Place
from abyssal.checkpoint.hf.file_plan import PlannedFile, fill_files, stored_bytes
from abyssal.checkpoint.hf.headers import DTYPES, FP8
from abyssal.checkpoint.hf.names import BIAS, SCALE_SUFFIX, is_quantised
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
class Target:
    """A tensor of the output: a weight, or (`is_scale`) the scales of one.

    `weight` is where the weight stands in the input, `scale` the scales to use with it: those of an FP8 weight, or
    those that are given for a weight that becomes FP8.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    weight: Place
    scale: Place | None
    is_scale: bool = False


@dataclass(frozen=True, slots=True)
class Shard(PlannedFile[Target]):
    """One file of the output."""

    power_of_two: bool


def plan_shards(
    names: Iterable[str], places: Mapping[str, Place], given: Mapping[str, Place], conversion: Conversion
) -> list[Shard]:
    """Return the files to write.

    Args:
        names: the weights to write, in order, without scales.
        places: where weights and scales stand in the input.
        given: where scales stand that are to be used again, by the names of the scales; they may be none.
        conversion: what was asked for.
    """
    units = (_targets(name, places, given, conversion) for name in names)
    return [
        Shard(file, tuple(sorted(targets, key=_order)), conversion.power_of_two)
        for file, targets in fill_files(units, conversion.max_shard_bytes)
    ]


def digest(shards: Iterable[Shard]) -> str:
    """Return what changes when something else is to be written, or the same from other places."""
    whole = hashlib.sha256()
    for shard in shards:
        whole.update(shard.header())
        for target in shard.tensors:
            whole.update(f"{target.weight}{target.scale}{target.is_scale}{shard.power_of_two}\n".encode())
    return whole.hexdigest()


def _targets(
    name: str, places: Mapping[str, Place], given: Mapping[str, Place], conversion: Conversion
) -> list[Target]:
    """Return what the weight `name` becomes: itself, in FP8 with its scales behind it."""
    weight, scale = places[name], places.get(name + SCALE_SUFFIX)
    if name.endswith(FLOAT32):
        return [Target(name, "F32", weight.shape, weight, scale)]
    if conversion.to != "fp8" or not is_quantised(name):
        return [Target(name, PLAIN[conversion.to], weight.shape, weight, scale)]
    if weight.dtype != FP8:
        scale = given.get(name + SCALE_SUFFIX)
    shape = scale_shape(weight.shape)
    return [
        Target(name, FP8, weight.shape, weight, scale),
        Target(name + SCALE_SUFFIX, "F32", shape, weight, scale, is_scale=True),
    ]


def _order(target: Target) -> tuple[int, int]:
    """Return the sorting key within a file: what keeps 4-byte values aligned, weights before their scales.

    First everything of a multiple of 4 bytes but scales, as planned; then scales, so that quantising a weight of the
    usual size comes before writing its scales; then the odd rest, the wider values first.
    """
    if target.is_scale:
        return 1, 0
    return (0, 0) if stored_bytes(target) % 4 == 0 else (2, -DTYPES[target.dtype].itemsize)
