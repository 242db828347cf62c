"""SwiGLU against its formula."""

from __future__ import annotations

import torch

from abyssal.ops.swiglu import swiglu


def test_swiglu_equals_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, coefficients = (torch.randn(4, 3, dtype=torch.float64, generator=generator) for _ in range(3))
    gate.requires_grad_()
    up.requires_grad_()
    out = swiglu(gate, up)
    sigmoid = 1 / (1 + torch.exp(-gate.detach()))
    torch.testing.assert_close(out.detach(), gate.detach() * sigmoid * up.detach(), rtol=1e-9, atol=1e-9)
    d_gate, d_up = torch.autograd.grad((out * coefficients).sum(), (gate, up))
    slope = sigmoid * (1 + gate.detach() * (1 - sigmoid))
    torch.testing.assert_close(d_gate, coefficients * up.detach() * slope, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(d_up, coefficients * gate.detach() * sigmoid, rtol=1e-9, atol=1e-9)
