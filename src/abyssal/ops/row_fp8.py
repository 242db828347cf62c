"""Rows of activations in FP8 (e4m3) with one scale for each 128 consecutive values: x = fp8 * scale.

Legend: S rows, D values of a row, C = ceil(D / 128); the last group of a row may be smaller. All arithmetic is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from abyssal.ops.block_fp8 import BLOCK, scale_of, widen


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
    width = rows.shape[1]
    groups = F.pad(rows.to(torch.float32), (0, -width % BLOCK)).unflatten(1, (-1, BLOCK))  # [S, C, 128]
    scale = scale_of(groups.abs().amax(2), power_of_two=power_of_two)
    fp8 = (groups / scale[..., None]).to(torch.float8_e4m3fn)
    return fp8.flatten(1)[:, :width], scale


def dequantise_rows(fp8: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [S, D] in `dtype`: fp8 * scale in fp32, rounded once.

    Args:
        fp8: [S, D] float8_e4m3fn.
        scale: [S, C] fp32 or float8_e8m0fnu.
        dtype: fp64, fp32, bf16 or fp16.
    """
    factors = scale.to(torch.float32).repeat_interleave(BLOCK, 1)[:, : fp8.shape[1]]  # [S, D]
    return widen(fp8).mul_(factors).to(dtype)
