"""What a conversion will write: every tensor of the output with its place in the input, file by file."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from abyssal.checkpoint.convert.places import DTYPES, Place
from abyssal.checkpoint.layout import BIAS, SCALE_SUFFIX, is_quantised
from abyssal.checkpoint.safetensors_files import FP8, SINGLE
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

    @property
    def nbytes(self) -> int:
        """The bytes of its values."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the output, its tensors in the order of their values."""

    name: str
    targets: tuple[Target, ...]
    power_of_two: bool

    def header(self) -> bytes:
        """Return how the file begins: 8 bytes of length, then JSON that tells where each tensor stands.

        The JSON is padded to a multiple of 8 bytes, as safetensors' own writer does.
        """
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for target in self.targets:
            entries[target.name] = {
                "dtype": target.dtype,
                "shape": target.shape,
                "data_offsets": [begin, begin + target.nbytes],
            }
            begin += target.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def tensor_bytes(self) -> int:
        """The bytes of its tensors."""
        return sum(target.nbytes for target in self.targets)

    @property
    def nbytes(self) -> int:
        """The length of the file."""
        return len(self.header()) + self.tensor_bytes


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
    groups: list[list[Target]] = [[]]
    held = 0
    for name in names:
        targets = _targets(name, places, given, conversion)
        size = sum(target.nbytes for target in targets)
        if groups[-1] and held + size > conversion.max_shard_bytes:
            groups.append([])
            held = 0
        groups[-1] += targets
        held += size
    count = len(groups)
    files = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    return [
        Shard(file, tuple(sorted(targets, key=_order)), conversion.power_of_two)
        for file, targets in zip(files, groups, strict=True)
    ]


def digest(shards: Iterable[Shard]) -> str:
    """Return what changes when something else is to be written, or the same from other places."""
    whole = hashlib.sha256()
    for shard in shards:
        whole.update(shard.header())
        for target in shard.targets:
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
    return (0, 0) if target.nbytes % 4 == 0 else (2, -DTYPES[target.dtype].itemsize)
