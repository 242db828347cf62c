"""The product behind every projection: weights cast once, and weight gradients that wait."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abyssal.ops.linear import CastWeight, WeightGradients, cast_once, linear

ROWS, INPUTS, OUTPUTS = 7, 5, 3
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaf(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return draw(seed, *shape, dtype=dtype).requires_grad_()


def test_the_product_is_that_of_the_rows_with_the_transposed_weight() -> None:
    x, weight = draw(0, ROWS, INPUTS), draw(1, OUTPUTS, INPUTS)
    expected = torch.tensor([[sum(a * b for a, b in zip(row, w, strict=True)) for w in weight] for row in x])
    torch.testing.assert_close(linear(x, weight), expected.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_deferred_gradient_is_the_same_to_the_bit_and_waits_for_its_run(dtype: torch.dtype) -> None:
    outward = draw(2, ROWS, OUTPUTS, dtype=dtype)
    x, weight = leaf(0, ROWS, INPUTS, dtype=dtype), leaf(1, OUTPUTS, INPUTS, dtype=dtype)
    linear(x, weight).backward(outward)
    late_x, late = leaf(0, ROWS, INPUTS, dtype=dtype), leaf(1, OUTPUTS, INPUTS, dtype=dtype)
    deferred = WeightGradients()
    linear(late_x, late, deferred).backward(outward)
    assert late_x.grad is not None
    assert torch.equal(late_x.grad, x.grad)  # type: ignore[arg-type]
    assert late.grad is None
    deferred.run()
    assert torch.equal(late.grad, weight.grad)  # type: ignore[arg-type]


def test_each_product_runs_once() -> None:
    made = []
    weight = leaf(1, OUTPUTS, INPUTS)

    def product(number: int) -> Tensor:
        made.append(number)
        return torch.full((OUTPUTS, INPUTS), float(number), dtype=torch.float64)

    deferred = WeightGradients()
    for number in (1, 2):
        deferred.put(weight, lambda number=number: product(number))
    taken = deferred.take()
    assert (len(deferred), len(taken)) == (0, 2)
    deferred.put(weight, lambda: product(4))
    taken.run()
    taken.run()
    assert made == [1, 2]
    assert len(taken) == 0
    deferred.run()
    assert made == [1, 2, 4]
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full_like(weight, 7.0))


def test_gradients_of_several_micro_batches_may_wait_and_run_in_any_order() -> None:
    deferred, waiting, expected = WeightGradients(), [], torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    weight = leaf(1, OUTPUTS, INPUTS)
    for seed in (3, 4, 5):
        x, outward = leaf(seed, ROWS, INPUTS), draw(seed + 10, ROWS, OUTPUTS)
        linear(x, weight, deferred).backward(outward)
        waiting.append(deferred.take())
        expected += outward.T @ x.detach()
    for one in (waiting[1], waiting[2], waiting[0]):
        one.run()
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_nothing_is_left_where_the_rows_take_no_gradient() -> None:
    """There is no backward pass of dX then, so the weight stays with autograd."""
    weight, deferred = leaf(1, OUTPUTS, INPUTS), WeightGradients()
    linear(draw(0, ROWS, INPUTS), weight, deferred).sum().backward()
    assert len(deferred) == 0
    assert weight.grad is not None


def test_a_deferred_gradient_passes_what_lies_between_the_weight_and_its_parameter() -> None:
    stack, deferred = leaf(1, 2, OUTPUTS, INPUTS), WeightGradients()
    x = leaf(0, ROWS, INPUTS, dtype=torch.float32)
    linear(x, stack[1].to(torch.float32), deferred).sum().backward()
    deferred.run()
    assert stack.grad is not None
    assert stack.grad.dtype == torch.float64
    assert not stack.grad[0].any()
    torch.testing.assert_close(stack.grad[1], x.detach().double().sum(0).expand(OUTPUTS, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("deferring", [False, True], ids=["at once", "deferred"])
def test_a_weight_that_is_cast_once_gives_what_one_gives_that_is_cast_on_use(deferring: bool) -> None:
    """To the bit, over two micro-batches: the gradient is rounded to bf16 once a product, and added up in fp32."""
    weight, other = leaf(1, OUTPUTS, INPUTS, dtype=torch.float32), leaf(1, OUTPUTS, INPUTS, dtype=torch.float32)
    deferred = WeightGradients() if deferring else None
    cast = CastWeight(other, torch.bfloat16, deferred)
    for seed in (3, 4):
        x, outward = leaf(seed, ROWS, INPUTS, dtype=torch.bfloat16), draw(9, ROWS, OUTPUTS, dtype=torch.bfloat16)
        y = linear(x, weight.to(torch.bfloat16))
        y.backward(outward)
        again = leaf(seed, ROWS, INPUTS, dtype=torch.bfloat16)
        assert torch.equal(cast(again), y)
        cast(again).backward(outward)
        if deferred is not None:
            assert len(deferred) == 1
            deferred.take().run()
        assert again.grad is not None
        assert torch.equal(again.grad, x.grad)  # type: ignore[arg-type]
    assert other.grad is not None
    assert other.grad.dtype == torch.float32
    assert torch.equal(other.grad, weight.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_a_cast_weight_add_up_in_the_weights_dtype(dtype: torch.dtype) -> None:
    """Two uses in one backward pass, and two passes: sums that bf16 would round away are kept."""
    weight = leaf(1, OUTPUTS, INPUTS, dtype=torch.float32)
    values = cast_once(weight, dtype)
    for big, small in ((256.0, 1.0), (1.0, 1.0)):
        (big * values.sum() + small * values.sum()).backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((OUTPUTS, INPUTS), 259.0))
    assert values is weight or values.grad is None


def test_a_weight_of_the_dtype_is_not_copied_and_one_without_gradient_takes_none() -> None:
    weight = leaf(1, OUTPUTS, INPUTS)
    assert cast_once(weight, torch.float64) is weight
    assert CastWeight(weight, torch.float64).weight is weight
    frozen = draw(1, OUTPUTS, INPUTS)
    assert not cast_once(frozen, torch.bfloat16).requires_grad
