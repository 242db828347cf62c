"""RMSNorm against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from abyssal.ops.rms_norm import rms_norm


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (7,)], ids=str)
def test_rms_norm_equals_the_definition(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, generator=generator, requires_grad=True)
    coefficients = torch.randn(shape, dtype=torch.float64, generator=generator)
    eps = 1e-3  # large, so that a wrong place for it shows
    rows = []
    for row in x.reshape(-1, shape[-1]):
        rms = torch.sqrt(sum(v * v for v in row) / len(row) + eps)
        rows.append(torch.stack([v / rms * w for v, w in zip(row, weight, strict=True)]))
    expected = torch.stack(rows).view(shape)
    out = rms_norm(x, weight, eps)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for actual, oracle in zip(
        torch.autograd.grad((out * coefficients).sum(), (x, weight)),
        torch.autograd.grad((expected * coefficients).sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(actual, oracle, rtol=1e-9, atol=1e-9)


def test_bfloat16_mean_square_is_accumulated_in_float32() -> None:
    """A bf16 sum of 4096 squares would stop growing at 256."""
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    out = rms_norm(x, torch.full((4096,), 1.5), 0.0)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.float(), torch.full((1, 4096), 1.5))


def test_zero_rows_stay_zero() -> None:
    assert math.isclose(rms_norm(torch.zeros(2, 3), torch.ones(3), 1e-6).abs().sum().item(), 0.0)
