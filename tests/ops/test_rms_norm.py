"""RMSNorm against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from abyssal.ops.rms_norm import Normalise, lean_rms_norm, rms_norm

VERSIONS = pytest.mark.parametrize("norm", [rms_norm, lean_rms_norm], ids=lambda version: version.__name__)


@VERSIONS
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (7,)], ids=str)
def test_rms_norm_equals_the_definition(shape: tuple[int, ...], norm: Normalise) -> None:
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
    for actual, oracle in zip(
        torch.autograd.grad((out * coefficients).sum(), (x, weight)),
        torch.autograd.grad((expected * coefficients).sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(actual, oracle, rtol=1e-9, atol=1e-9)


@VERSIONS
def test_bfloat16_rows_are_normed_in_float32_and_rounded_once_before_the_weight(norm: Normalise) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 96, generator=generator).bfloat16()
    weight = torch.randn(96, generator=generator)
    out = norm(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(out, exact.bfloat16() * weight.bfloat16())


def test_bfloat16_gradients_are_within_its_rounding() -> None:
    x, weight, grad = torch.randn(40, 96).bfloat16(), torch.randn(96), torch.randn(40, 96).bfloat16()
    found, exact = [], []
    for norm, dtype, gradients in ((lean_rms_norm, torch.bfloat16, found), (rms_norm, torch.float64, exact)):
        x_in = x.to(dtype).requires_grad_()
        w_in = weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        gradients += torch.autograd.grad(norm(x_in, w_in, 1e-6), (x_in, w_in), grad.to(dtype))
    for actual, oracle in zip(found, exact, strict=True):
        assert (actual.double() - oracle).norm() < 2**-7 * oracle.norm()


@VERSIONS
def test_zero_rows_stay_zero(norm: Normalise) -> None:
    assert math.isclose(norm(torch.zeros(2, 3), torch.ones(3), 1e-6).abs().sum().item(), 0.0)
