"""Weights in FP8 (e4m3) with one scale for each block of 128 x 128, as released: W = fp8 * scale.

A file calls the scale `weight_scale_inv`; in spite of that name it is the factor that gives the weight back.

Legend: N rows, K columns, G = ceil(N / 128), C = ceil(K / 128). The last row and column of blocks may be smaller than
128: of 576 rows the fifth block has 64. All arithmetic is fp32, and a row of blocks is worked on at a time, so that
little more than the result is held. A range of rows that begins at a multiple of 128 can be worked on alone, with the
scales `scale[scale_rows(start, stop)]`; the results are the rows of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

BLOCK = 128
#: The largest finite value of e4m3.
FP8_MAX = 448.0


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return [G, C], the shape of the scales of a weight [N, K]."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def scale_rows(start: int, stop: int) -> slice:
    """Return which rows of the scales belong to the rows start..stop of a weight; `start` is a multiple of 128."""
    return slice(start // BLOCK, -(-stop // BLOCK))


def quantise_blocks(weight: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Return FP8 values and scales, scale = amax / 448 of each block; a block of zeros has scale 1.

    Args:
        weight: [N, K], any floating dtype.
        power_of_two: raise each scale to the next power of two (`scale_fmt` ue8m0).

    Returns:
        [N, K] float8_e4m3fn, rounded to nearest even, and [G, C] fp32. No scale is below 2**-126, the smallest normal
        fp32. A block that holds NaN or infinity gets a scale of NaN and NaN values, and the others are as without it:
        one look at the scales tells whether a weight was finite.

    Paper: §3.3.2.
    """
    scale = weight.new_empty(scale_shape(weight.shape), dtype=torch.float32)
    for block, rows in _row_blocks(weight):
        part = weight[rows].to(torch.float32)
        if rest := -weight.shape[1] % BLOCK:
            part = F.pad(part, (0, rest))  # [<=128, C * 128]
        amax = part.abs().unflatten(1, (-1, BLOCK)).amax((0, 2))  # [C]
        scale[block] = scale_of(amax, power_of_two=power_of_two)
    return requantise_blocks(weight, scale), scale


def scale_of(amax: Tensor, *, power_of_two: bool) -> Tensor:
    """Return the scale of blocks with the largest magnitudes `amax`, fp32 both; see `quantise_blocks`."""
    factor = (amax / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    if power_of_two:
        mantissa, exponent = torch.frexp(factor)  # mantissa in [0.5, 1)
        factor = torch.ldexp(torch.ones_like(factor), exponent - (mantissa == 0.5).to(exponent.dtype))
    factor = torch.where(amax == 0, torch.ones_like(factor), factor)
    return torch.where(amax.isfinite(), factor, torch.nan)


def requantise_blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the FP8 values of `weight` [N, K] for scales that are given, [G, C] fp32 or float8_e8m0fnu.

    With the scales that it came from, a weight that was dequantised to bf16 or fp32 becomes the same FP8 values again.
    What a scale does not cover, |weight / scale| above 448 after rounding, becomes NaN: nothing is clipped unseen.
    """
    out = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for block, rows in _row_blocks(weight):
        quotient = weight[rows].to(torch.float32) / _columns(scale[block], weight.shape[1])
        # the cast to FP8 saturates on some devices, and rounds 464, half way to what would be next, down to 448
        if not all(bound.abs() <= 464 for bound in torch.aminmax(quotient)):  # the look is cheap, the mask is not
            quotient.masked_fill_(quotient.abs() > 464, torch.nan)
        out[rows] = quotient.to(torch.float8_e4m3fn)
    return out


def dequantise_blocks(fp8: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K] in `dtype`: fp8 * scale in fp32, rounded once.

    Args:
        fp8: [N, K] float8_e4m3fn; NaN stays NaN.
        scale: [G, C] fp32 or float8_e8m0fnu; a scale of NaN makes its block NaN.
        dtype: fp32, bf16 or fp16.
    """
    out = torch.empty_like(fp8, dtype=dtype)
    for block, rows in _row_blocks(fp8):
        out[rows] = widen(fp8[rows]).mul_(_columns(scale[block], fp8.shape[1]))
    return out


def widen(fp8: Tensor) -> Tensor:
    """Return FP8 values in fp32, exactly: on a CPU by moving bits, eight times as fast as torch's cast.

    Sign, exponent and mantissa of e4m3, seven bits to the left, are an fp16 number 2**8 times smaller, because the
    exponents' biases are 7 and 15; that holds for the smallest numbers too. Only NaN reads as 480.
    """
    if fp8.device.type != "cpu":
        return fp8.to(torch.float32)
    bits = fp8.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    bits.bitwise_and_(-0x4001)  # the copy of the sign, which the widening put into the exponent
    values = bits.view(torch.float16).to(torch.float32).mul_(256.0)
    if fp8.numel() and (fp8.view(torch.uint8) & 0x7F).amax() == 0x7F:
        values.masked_fill_(values.abs() == 480.0, torch.nan)
    return values


def _row_blocks(weight: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (row of the scales, rows of the weight that it covers)."""
    for block in range(-(-weight.shape[0] // BLOCK)):
        yield block, slice(block * BLOCK, (block + 1) * BLOCK)


def _columns(scale: Tensor, columns: int) -> Tensor:
    """Return one row of scales [C] as a factor for each column, [K] fp32."""
    return scale.to(torch.float32).repeat_interleave(BLOCK)[:columns]
