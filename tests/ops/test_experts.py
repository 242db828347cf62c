"""The routed experts against a loop over rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abyssal.ops import experts
from abyssal.ops.experts import CastExperts, Experts, expert_ffn, segmented_expert_ffn
from abyssal.ops.linear import WeightGradients

HIDDEN, WIDTH = 5, 3
COUNTS = [(4, 2, 1, 3), (0, 6, 0, 1, 0), (0, 0, 9), (7,), (2, 0), (0, 0)]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def by_hand(rows: Tensor, weights: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """g * W_down (silu(W_gate x) * W_up x), one row at a time; eq. 12."""
    width = down.shape[2]
    owners = [expert for expert, n in enumerate(counts.tolist()) for _ in range(n)]
    outputs = []
    for row, expert in enumerate(owners):
        gate = gate_up[expert, :width] @ rows[row]
        up = gate_up[expert, width:] @ rows[row]
        outputs.append(weights[row] * (down[expert] @ (gate / (1 + torch.exp(-gate)) * up)))
    return torch.stack(outputs) if outputs else rows * 0


def draw(seed: int, counts: tuple[int, ...], hidden: int = HIDDEN, width: int = WIDTH) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    rows, total = len(counts), sum(counts)
    weights = torch.rand(total, dtype=torch.float64, generator=generator)
    inputs = (normal(total, hidden), weights, normal(rows, 2 * width, hidden), normal(rows, hidden, width))
    return (*inputs, normal(total, hidden))


def run(kernel: Experts, inputs: Inputs, counts: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the gradients of rows, weights, gate_up and down, in float64.

    Routing weights are at least fp32; the expert weights too, as in training with fp32 masters.
    """
    wide = torch.promote_types(dtype, torch.float32)
    rows, weights, gate_up, down, coefficients = inputs
    leaves = [rows.to(dtype), weights.to(wide), gate_up.to(wide), down.to(wide)]
    rows, weights, gate_up, down = (x.detach().requires_grad_() for x in leaves)
    out = kernel(rows, weights, torch.tensor(counts), gate_up, down)
    assert out.dtype == dtype
    gradients = torch.autograd.grad((out * coefficients.to(dtype)).sum(), (rows, weights, gate_up, down))
    for leaf, gradient in zip((rows, weights, gate_up, down), gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
    return [x.detach().double() for x in (out, *gradients)]


@pytest.fixture(params=[2, 3, 64], ids="windows of {}".format)
def _window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let windows end inside the next expert's rows, begin inside the last one's, or hold all rows there are."""
    monkeypatch.setattr(experts._Segment, "ROUND", request.param)


@pytest.mark.usefixtures("_window")
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("kernel", [expert_ffn, segmented_expert_ffn])
def test_experts_equal_the_definition(kernel: Experts, counts: tuple[int, ...]) -> None:
    inputs = draw(sum(counts) + len(counts), counts)
    actual = run(kernel, inputs, counts, torch.float64)
    expected = run(by_hand, inputs, counts, torch.float64) if sum(counts) else [torch.zeros_like(x) for x in actual]
    for value, oracle in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, oracle, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("counts", COUNTS[:3], ids=str)
def test_segmented_gradient_equals_finite_differences(counts: tuple[int, ...]) -> None:
    rows, weights, gate_up, down, _ = (x.requires_grad_() for x in draw(11, counts))
    assert torch.autograd.gradcheck(
        lambda x, w, a, b: segmented_expert_ffn(x, w, torch.tensor(counts), a, b), (rows, weights, gate_up, down)
    )


@pytest.mark.parametrize("kernel", [expert_ffn, segmented_expert_ffn])
def test_experts_without_rows_get_a_zero_gradient(kernel: Experts) -> None:
    counts = (0, 3, 0)
    _, _, _, d_gate_up, d_down = run(kernel, draw(2, counts), counts, torch.float64)
    for gradient in (d_gate_up, d_down):
        assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
        assert torch.equal(gradient[2], torch.zeros_like(gradient[2]))
        assert gradient[1].abs().max() > 0


def test_segmented_experts_accept_rows_and_gradients_that_are_not_contiguous() -> None:
    counts = (3, 2)
    rows, weights, gate_up, down, coefficients = draw(7, counts)
    outputs = []
    for kernel in (expert_ffn, segmented_expert_ffn):
        leaf = rows.T.contiguous().requires_grad_()  # [D, M]
        out = kernel(leaf.T, weights, torch.tensor(counts), gate_up, down)
        (out.T @ coefficients).sum().backward()
        outputs.append((out.detach(), leaf.grad))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("_window")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("kernel", [expert_ffn, segmented_expert_ffn])
def test_cast_stacks_and_deferred_gradients_change_no_bit(
    kernel: Experts, counts: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Over two micro-batches with fp32 masters: rows' gradients come at once, the stacks' where they are run."""
    wide = torch.promote_types(dtype, torch.float32)
    drawn = [draw(seed, counts) for seed in (3, 4)]
    plain, cast, late = ([stack.to(wide, copy=True).requires_grad_() for stack in drawn[0][2:4]] for _ in range(3))
    deferred = WeightGradients()
    once = CastExperts(kernel, *cast, dtype)
    later = CastExperts(kernel, *late, dtype, deferred)
    for rows, weights, _, _, outward in drawn:
        inputs = [[x.to(t, copy=True).requires_grad_() for x, t in ((rows, dtype), (weights, wide))] for _ in range(3)]
        outputs = [
            kernel(*inputs[0], torch.tensor(counts), *plain),
            once(*inputs[1], torch.tensor(counts)),
            later(*inputs[2], torch.tensor(counts)),
        ]
        before = [None if stack.grad is None else stack.grad.clone() for stack in late]
        for output in outputs:
            output.backward(outward.to(dtype))
        for a, b in zip(before, late, strict=True):
            assert (b.grad is None) if a is None else torch.equal(a, b.grad)  # type: ignore[arg-type]
        deferred.take().run()
        for output, (x, w) in zip(outputs[1:], inputs[1:], strict=True):
            assert torch.equal(output, outputs[0])
            assert torch.equal(x.grad, inputs[0][0].grad)  # type: ignore[arg-type]
            assert torch.equal(w.grad, inputs[0][1].grad)  # type: ignore[arg-type]
    for stacks in (cast, late):
        for a, b in zip(stacks, plain, strict=True):
            assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
