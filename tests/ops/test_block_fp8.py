"""Block-scaled FP8 against float64 loops and a table of all FP8 values."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from abyssal.ops.block_fp8 import (
    BLOCK,
    dequantise_blocks,
    quantise_blocks,
    requantise_blocks,
    scale_rows,
    scale_shape,
)


@pytest.fixture
def seed() -> int:
    """Another one at each run; a failing test shows it."""
    return random.randrange(2**31)


SHAPES = [(576, 300), (1, 129), (128, 128), (257, 64)]


def e4m3_values() -> list[float]:
    """Every non-negative finite value: 4 exponent bits with bias 7, 3 mantissa bits, no infinity, in rising order."""
    subnormal = [mantissa * 2.0**-9 for mantissa in range(8)]
    normal = [(8 + mantissa) * 2.0 ** (exponent - 10) for exponent in range(1, 16) for mantissa in range(8)]
    return (subnormal + normal)[:-1]  # the last pattern is NaN


def nearest_e4m3(value: float) -> float:
    """Round the magnitude to nearest, ties to the even mantissa, by search in the table."""
    table = e4m3_values()
    return table[min(range(len(table)), key=lambda i: (abs(table[i] - abs(value)), i % 2))]


def draw(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights whose blocks have very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-20, 12, scale_shape(shape), generator=generator).float())
    spread = sizes.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def blocks(shape: tuple[int, int]) -> list[tuple[int, int, slice, slice]]:
    return [
        (i, j, slice(i * 128, min(i * 128 + 128, shape[0])), slice(j * 128, min(j * 128 + 128, shape[1])))
        for i in range(math.ceil(shape[0] / 128))
        for j in range(math.ceil(shape[1] / 128))
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_scale_is_the_largest_magnitude_of_its_block_over_448(
    shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    weight = draw(shape, seed, dtype)
    _, scale = quantise_blocks(weight)
    assert scale.dtype == torch.float32
    assert scale.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128)) == scale_shape(shape)
    for i, j, rows, columns in blocks(shape):
        exact = max(abs(value) for row in weight[rows, columns].double().tolist() for value in row) / 448
        assert scale[i, j].item() == torch.tensor(exact, dtype=torch.float64).float().item()


def test_every_value_is_the_nearest_fp8_number_to_weight_over_scale(seed: int) -> None:
    weight = draw((130, 131), seed)
    fp8, scale = quantise_blocks(weight)
    for i, j, rows, columns in blocks((130, 131)):
        values, stored = weight[rows, columns].flatten().tolist(), fp8[rows, columns].float().flatten().tolist()
        factor = scale[i, j].item()
        for value, kept in list(zip(values, stored, strict=True))[:: 1 + len(values) // 400]:
            quotient = torch.tensor(value).div(factor).item()  # fp32, as the definition says
            assert abs(kept) == nearest_e4m3(quotient)
            assert kept == 0 or math.copysign(1, kept) == math.copysign(1, value)


def test_the_cast_agrees_with_the_table_of_fp8_numbers_at_every_value_tie_and_neighbour() -> None:
    table = e4m3_values()
    middles = [(a + b) / 2 for a, b in pairwise(table)]
    points = torch.tensor([*table, *middles, 464.0])
    points = torch.cat([points, torch.nextafter(points, torch.tensor(0.0)), torch.nextafter(points, torch.tensor(1e9))])
    points = torch.cat([points[points <= 464], -points[points <= 464]])[None]
    fp8 = requantise_blocks(points, torch.ones(scale_shape(points.shape)))
    for point, kept in zip(points[0].tolist(), fp8[0].float().tolist(), strict=True):
        assert abs(kept) == nearest_e4m3(point), point


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dequantised_weights_are_the_product_in_fp32_rounded_once(
    shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0  # NaN has a test of its own
    fp8 = codes.view(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape(shape), generator=generator) * 1e-2
    out = dequantise_blocks(fp8, scale, dtype)
    assert out.dtype == dtype
    table = e4m3_values()
    for i, j, rows, columns in blocks(shape):
        signed = [[(-1 if c & 128 else 1) * table[c & 127] for c in row] for row in codes[rows, columns].tolist()]
        exact = torch.tensor(signed, dtype=torch.float64) * scale[i, j].double()  # no more than 53 bits, so exact
        assert torch.equal(out[rows, columns], exact.float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_kept_scales_every_fp8_number_survives_a_way_through_bf16(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.arange(256, dtype=torch.uint8).repeat(200, 1)
    codes = codes[:, torch.randperm(256, generator=generator)]
    fp8 = codes.view(torch.float8_e4m3fn)
    scale = torch.exp2(torch.empty(2, 2).uniform_(-30, 5, generator=generator))
    again = requantise_blocks(dequantise_blocks(fp8, scale, dtype), scale)
    nan = (codes & 127) == 127
    assert torch.equal(again.view(torch.uint8)[~nan], codes[~nan])
    assert again.float()[nan].isnan().all()


def test_quantising_twice_gives_the_same_as_once(seed: int) -> None:
    fp8, scale = quantise_blocks(draw((300, 200), seed))
    again, scale_again = quantise_blocks(dequantise_blocks(fp8, scale, torch.float32))
    assert torch.equal(again.view(torch.uint8), fp8.view(torch.uint8))
    torch.testing.assert_close(scale_again, scale, rtol=2**-23, atol=0)


def test_powers_of_two_are_the_next_ones_above_and_fit_e8m0(seed: int) -> None:
    weight = draw((576, 300), seed)
    weight[:128, :128] = 0
    weight[5, 7] = -448 * 2.0**-7  # exactly a power of two already
    fp8, scale = quantise_blocks(weight, power_of_two=True)
    _, plain = quantise_blocks(weight)
    assert scale[0, 0] == 2.0**-7
    for rounded, exact in zip(scale.flatten().tolist(), plain.flatten().tolist(), strict=True):
        assert rounded == 2.0 ** math.ceil(math.log2(exact))
    as_stored = scale.to(torch.float8_e8m0fnu)
    assert torch.equal(as_stored.float(), scale)
    assert torch.equal(dequantise_blocks(fp8, as_stored, torch.bfloat16), dequantise_blocks(fp8, scale, torch.bfloat16))
    assert torch.equal(requantise_blocks(weight, as_stored).view(torch.uint8), fp8.view(torch.uint8))


def test_blocks_of_zeros_have_scale_1_and_keep_the_sign_of_zero(seed: int) -> None:
    weight = draw((200, 300), seed)
    weight[128:, 256:] = -0.0
    for power_of_two in (False, True):
        fp8, scale = quantise_blocks(weight, power_of_two=power_of_two)
        assert scale[1, 2] == 1
        assert (fp8[128:, 256:].view(torch.uint8) == 128).all()


def test_blocks_of_the_smallest_numbers_have_a_normal_scale() -> None:
    weight = torch.full((3, 5), 2.0**-149)
    for power_of_two in (False, True):
        fp8, scale = quantise_blocks(weight, power_of_two=power_of_two)
        assert scale.item() == 2.0**-126
        assert fp8.float().isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_shows_in_the_scale_of_its_block_and_nowhere_else(bad: float, seed: int) -> None:
    weight = draw((300, 300), seed)
    clean, clean_scale = quantise_blocks(weight)
    weight[140, 20] = bad
    fp8, scale = quantise_blocks(weight)
    spoilt = torch.zeros(3, 3, dtype=torch.bool)
    spoilt[1, 0] = True
    assert torch.equal(scale.isnan(), spoilt)
    assert torch.equal(scale[~spoilt], clean_scale[~spoilt])
    assert fp8[128:256, :128].float().isnan().all()
    rest = torch.ones(300, 300, dtype=torch.bool)
    rest[128:256, :128] = False
    assert torch.equal(fp8.view(torch.uint8)[rest], clean.view(torch.uint8)[rest])


def test_what_a_given_scale_does_not_cover_becomes_nan() -> None:
    weight = torch.tensor([[448.0, 463.9, 464.0, 464.1, -465.0, 1e9]])
    fp8 = requantise_blocks(weight, torch.ones(1, 1)).float()
    assert fp8[0, :3].tolist() == [448.0] * 3
    assert fp8[0, 3:].isnan().all()


def test_a_scale_of_nan_makes_its_block_nan(seed: int) -> None:
    fp8, scale = quantise_blocks(draw((200, 150), seed))
    scale[1, 0] = math.nan
    out = dequantise_blocks(fp8, scale, torch.bfloat16)
    assert out[128:, :128].isnan().all()
    assert out[:128].isfinite().all()
    assert out[:, 128:].isfinite().all()


def test_ranges_of_rows_are_the_rows_of_the_whole(seed: int) -> None:
    weight = draw((576, 200), seed, torch.bfloat16)
    fp8, scale = quantise_blocks(weight)
    whole = dequantise_blocks(fp8, scale, torch.bfloat16)
    for start, stop in [(0, 256), (256, 576), (512, 576), (128, 300)]:
        part_fp8, part_scale = quantise_blocks(weight[start:stop])
        part = dequantise_blocks(fp8[start:stop], scale[scale_rows(start, stop)], torch.bfloat16)
        assert torch.equal(part, whole[start:stop])
        if stop != 300:  # whole blocks
            assert torch.equal(part_scale, scale[scale_rows(start, stop)])
            assert torch.equal(part_fp8.view(torch.uint8), fp8[start:stop].view(torch.uint8))
