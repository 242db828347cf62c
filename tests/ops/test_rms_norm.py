"""RMSNorm against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from abyssal.ops.rms_norm import VERSIONS, differentiable_rms_norm, lean_rms_norm
from abyssal.ops.version import Version

ALL = pytest.mark.parametrize("norm", VERSIONS, ids=lambda version: version.name)


@ALL
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (7,)], ids=str)
def test_rms_norm_equals_the_definition(shape: tuple[int, ...], norm: Version) -> None:
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
    out = norm(x, weight, eps)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    if "train" not in norm.purposes:
        return
    for actual, oracle in zip(
        torch.autograd.grad((out * coefficients).sum(), (x, weight)),
        torch.autograd.grad((expected * coefficients).sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(actual, oracle, rtol=1e-9, atol=1e-9)


@ALL
def test_bfloat16_rows_are_normed_in_float32_and_rounded_once_before_the_weight(norm: Version) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 96, generator=generator).bfloat16()
    weight = torch.randn(96, generator=generator)
    out = norm(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(out, exact.bfloat16() * weight.bfloat16())


@ALL
def test_zero_rows_stay_zero(norm: Version) -> None:
    assert math.isclose(norm(torch.zeros(2, 3), torch.ones(3), 1e-6).abs().sum().item(), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_decodes_norms_to_the_bits_of_one_that_trains(dtype: torch.dtype) -> None:
    x, weight = torch.randn(33, 65, generator=torch.Generator().manual_seed(3)).to(dtype), torch.linspace(0.5, 2, 65)
    assert torch.equal(lean_rms_norm(x, weight, 1e-6), differentiable_rms_norm(x, weight, 1e-6))
