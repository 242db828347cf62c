"""FP8 rows with a scale for 128 values against loops over Python floats."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from abyssal.ops import row_fp8
from abyssal.ops.row_fp8 import dequantise_rows, quantise_rows


@pytest.fixture
def seed() -> int:
    """Another one at each run; a failing test shows it."""
    return random.randrange(2**31)


def draw(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows whose groups have very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-20, 12, (shape[0], math.ceil(shape[1] / 128)), generator=generator).float())
    spread = sizes.repeat_interleave(128, 1)[:, : shape[1]]
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def groups(shape: tuple[int, int]) -> list[tuple[int, int, slice]]:
    return [
        (row, group, slice(128 * group, min(128 * group + 128, shape[1])))
        for row in range(shape[0])
        for group in range(math.ceil(shape[1] / 128))
    ]


SHAPES = [(5, 300), (3, 11), (4, 256), (7, 129)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scales_are_those_of_each_group_of_each_row(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
    rows = draw(shape, seed, dtype)
    fp8, scale = quantise_rows(rows)
    _, raised = quantise_rows(rows, power_of_two=True)
    assert fp8.shape == shape
    assert scale.shape == raised.shape == (shape[0], math.ceil(shape[1] / 128))
    for row, group, columns in groups(shape):
        exact = max(abs(value) for value in rows[row, columns].tolist()) / 448
        assert scale[row, group].item() == torch.tensor(exact, dtype=torch.float64).float().item()
        assert raised[row, group].item() == 2.0 ** math.ceil(math.log2(scale[row, group].item()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_value_comes_back_within_half_a_step(shape: tuple[int, int], seed: int) -> None:
    """A step of e4m3 is an eighth of the power of two below a value, and 2**-9 of the scale below 2**-6 of it."""
    rows = draw(shape, seed)
    fp8, scale = quantise_rows(rows, power_of_two=True)
    back = dequantise_rows(fp8, scale, torch.float64)
    for row, group, columns in groups(shape):
        factor = scale[row, group].item()
        for value, found in zip(rows[row, columns].tolist(), back[row, columns].tolist(), strict=True):
            exponent = max(math.frexp(value / factor)[1] - 1, -6) if value else -6
            assert abs(found - value) <= factor * 2.0 ** (exponent - 3) / 2, (value, factor)


def test_what_is_exact_in_fp8_comes_back_in_every_type(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (6, 300), generator=generator, dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0
    codes[:, ::128] = 126  # 448, so that every group has the scale it came with
    fp8 = codes.view(torch.float8_e4m3fn)
    scale = torch.exp2(torch.randint(-30, 30, (6, 3), generator=generator).float())
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rows = dequantise_rows(fp8, scale, dtype)
        assert rows.dtype == dtype
        again, scale_again = quantise_rows(rows, power_of_two=True)
        assert torch.equal(again.view(torch.uint8), codes)
        assert torch.equal(scale_again, scale)
    stored = dequantise_rows(fp8, scale.to(torch.float8_e8m0fnu), torch.float64)
    assert torch.equal(stored, dequantise_rows(fp8, scale, torch.float64))


def test_groups_of_zeros_have_scale_1_and_no_rows_are_no_rows() -> None:
    fp8, scale = quantise_rows(torch.zeros(2, 130), power_of_two=True)
    assert torch.equal(scale, torch.ones(2, 2))
    assert torch.equal(dequantise_rows(fp8, scale, torch.float32), torch.zeros(2, 130))
    none = quantise_rows(torch.zeros(0, 130), power_of_two=True)
    assert dequantise_rows(*none, torch.bfloat16).shape == (0, 130)


def test_rows_that_are_worked_on_apart_are_those_of_the_whole(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = draw((11, 300), seed)
    whole = quantise_rows(rows, power_of_two=True)
    back = dequantise_rows(*whole, torch.bfloat16)
    monkeypatch.setattr(row_fp8, "AT_A_TIME", 4 * 300)
    apart = quantise_rows(rows, power_of_two=True)
    assert torch.equal(apart[0].view(torch.uint8), whole[0].view(torch.uint8))
    assert torch.equal(apart[1], whole[1])
    assert torch.equal(dequantise_rows(*apart, torch.bfloat16), back)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_spoils_its_group_and_nothing_else(bad: float, seed: int) -> None:
    rows = draw((3, 300), seed)
    clean = dequantise_rows(*quantise_rows(rows, power_of_two=True), torch.float32)
    rows[1, 140] = bad
    fp8, scale = quantise_rows(rows, power_of_two=True)
    back = dequantise_rows(fp8, scale.to(torch.float8_e8m0fnu), torch.float32)
    assert back[1, 128:256].isnan().all()
    back[1, 128:256] = clean[1, 128:256]
    assert torch.equal(back, clean)
