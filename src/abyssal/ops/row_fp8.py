"""Rows of activations in FP8 (e4m3) with one scale for each 128 consecutive values: x = fp8 * scale.

All arithmetic is fp32. On a CPU so many rows are worked on at a time that what lies between stays in the cache, which
makes both ways five times as fast as in one go.

Legend: S rows, D values of a row, C = ceil(D / 128) groups; the last group of a row may be smaller.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from abyssal.ops.block_fp8 import BLOCK, scale_of, widen

#: Values that are worked on at a time on a CPU: 2 MB in fp32.
AT_A_TIME = 2**19


def quantise_rows(rows: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Return FP8 values and scales, scale = amax / 448 of each group; a group of zeros has scale 1.

    Args:
        rows: [S, D], any floating dtype.
        power_of_two: raise each scale to the next power of two.

    Returns:
        [S, D] float8_e4m3fn, rounded to nearest even, and [S, C] fp32, at least 2**-126. A group that holds NaN or
        infinity gets a scale of NaN and NaN values.

    Paper: §3.3.2.
    """
    count, width = rows.shape
    fp8 = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    scale = rows.new_empty(count, -(-width // BLOCK), dtype=torch.float32)
    for part in _parts(rows):
        groups = F.pad(rows[part].to(torch.float32), (0, -width % BLOCK)).unflatten(1, (-1, BLOCK))  # [s, C, 128]
        scale[part] = scale_of(groups.abs().amax(2), power_of_two=power_of_two)
        fp8[part] = (groups / scale[part, :, None]).flatten(1)[:, :width].to(torch.float8_e4m3fn)
    return fp8, scale


def dequantise_rows(fp8: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [S, D] in `dtype`: fp8 * scale in fp32, rounded once.

    Args:
        fp8: [S, D] float8_e4m3fn.
        scale: [S, C] fp32 or float8_e8m0fnu.
        dtype: fp64, fp32, bf16 or fp16.
    """
    factors = scale.to(torch.float32)
    out = torch.empty_like(fp8, dtype=dtype, memory_format=torch.contiguous_format)
    for part in _parts(fp8):
        out[part] = widen(fp8[part]).mul_(factors[part].repeat_interleave(BLOCK, 1)[:, : fp8.shape[1]])
    return out


def _parts(rows: Tensor) -> Iterator[slice]:
    """Yield ranges of rows, to be worked on one by one."""
    size = max(AT_A_TIME // max(rows.shape[1], 1), 1) if rows.device.type == "cpu" else len(rows)
    for start in range(0, len(rows), max(size, 1)):
        yield slice(start, start + size)
