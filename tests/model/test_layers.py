"""Weights keep their precision, activations theirs."""

from __future__ import annotations

import torch

from abyssal.model.layers import Linear, RMSNorm


def test_linear_computes_in_the_input_and_accumulates_the_gradient_in_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Linear(5, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 5, generator=generator))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(4, 5, generator=generator, dtype=torch.float64).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(y, x @ layer.weight.to(dtype).T)
        layer.weight.grad = None
        y.sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float32


def test_linear_has_no_bias() -> None:
    assert [name for name, _ in Linear(2, 3).named_parameters()] == ["weight"]
    assert Linear(2, 3).weight.shape == (3, 2)


def test_norm_keeps_the_dtype_of_its_input() -> None:
    layer = RMSNorm(4, 1e-6)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.tensor([[3.0, -3.0, 3.0, -3.0]], dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), 2 * x.sign().double(), rtol=0, atol=1e-6)
