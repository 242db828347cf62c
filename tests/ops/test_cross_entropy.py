"""Cross entropy and log-probabilities against a loop over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from abyssal.ops import cross_entropy
from abyssal.ops.cross_entropy import (
    LOG_PROBABILITIES,
    VERSIONS,
    chunked_linear_cross_entropy,
    chunked_log_probabilities,
    differentiable_log_probabilities,
    linear_cross_entropy,
)
from abyssal.ops.version import Version

KERNELS = pytest.mark.parametrize("kernel", VERSIONS, ids=lambda version: version.name)
Inputs = tuple[Tensor, Tensor, Tensor]


def by_hand(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The logarithm of the softmax at the target, one token at a time."""
    found = []
    for h, target in zip(hidden, targets.tolist(), strict=True):
        logits = [(row * h).sum() for row in weight]
        largest = max(x.item() for x in logits)
        partition = sum((torch.exp(x - largest) for x in logits[1:]), torch.exp(logits[0] - largest))
        found.append(logits[target] - largest - torch.log(partition))
    return torch.stack(found)


def draw(seed: int, tokens: int, hidden: int = 4, vocabulary: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocabulary, hidden, dtype=torch.float64, generator=generator)
    return h, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def run(kernel: Callable[..., Tensor], inputs: Inputs, *weights: Tensor) -> list[Tensor]:
    """Return the result, and the gradients of 0.3 times its sum."""
    hidden, weight, targets = inputs
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    out = kernel(hidden, weight, targets, *weights)
    return [out.detach(), *torch.autograd.grad(0.3 * out.sum(), (hidden, weight))]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for actual, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, oracle, rtol=1e-9, atol=1e-9)


def loss_by_hand(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: float | Tensor = 1.0) -> Tensor:
    return -(token_weights * by_hand(hidden, weight, targets)).sum()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "ROWS", 3)
    monkeypatch.setattr(cross_entropy, "SOFTMAX_VALUES", 2 * 9)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("tokens", [1, 3, 6, 8])
@KERNELS
def test_cross_entropy_equals_the_definition(kernel: Version, tokens: int) -> None:
    inputs = draw(tokens, tokens)
    assert_equal(run(kernel, inputs), run(loss_by_hand, inputs))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("tokens", [1, 3, 6, 8])
@KERNELS
def test_tokens_have_weights_in_the_cross_entropy(kernel: Version, tokens: int) -> None:
    """A mask, and advantages, which may be negative; in another dtype than the rest."""
    inputs = draw(tokens, tokens)
    for weights in (torch.arange(tokens) % 2 == 0, torch.linspace(-1, 2, tokens)):
        assert_equal(run(kernel, inputs, weights.float()), run(loss_by_hand, inputs, weights.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@KERNELS
def test_weights_of_one_change_no_bit_of_the_gradients(kernel: Version, dtype: torch.dtype) -> None:
    hidden, weight, targets = draw(5, 40)
    inputs = hidden.to(dtype), weight.float(), targets
    (plain, *gradients), (weighted, *others) = run(kernel, inputs), run(kernel, inputs, torch.ones(40))
    torch.testing.assert_close(weighted, plain, rtol=1e-6, atol=0)
    assert all(torch.equal(*both) for both in zip(gradients, others, strict=True))


@KERNELS
def test_no_gradient_flows_to_the_weights_of_tokens(kernel: Version) -> None:
    hidden, weight, targets = draw(6, 5)
    weights = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).requires_grad_()
    loss = kernel(hidden.requires_grad_(), weight, targets, weights)
    assert torch.autograd.grad(loss, (hidden, weights), allow_unused=True)[1] is None


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("tokens", [1, 3, 6, 8])
@pytest.mark.parametrize("kernel", LOG_PROBABILITIES, ids=lambda version: version.name)
def test_log_probabilities_equal_the_definition(kernel: Version, tokens: int) -> None:
    inputs = draw(tokens, tokens)
    if "train" in kernel.purposes:
        assert_equal(run(kernel, inputs), run(by_hand, inputs))
    else:
        assert_equal([kernel(*inputs)], [by_hand(*inputs)])


@pytest.mark.usefixtures("small_chunks")
def test_gradients_of_log_probabilities_equal_finite_differences() -> None:
    """Each token's own: what comes back differs from token to token."""
    hidden, weight, targets = draw(4, 7)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: differentiable_log_probabilities(h, w, targets), leaves)


def test_a_cross_entropy_is_a_weighted_sum_of_log_probabilities() -> None:
    inputs = draw(9, 30)
    weights = torch.linspace(-1, 2, 30, dtype=torch.float64)
    loss = run(chunked_linear_cross_entropy, inputs, weights)
    assert_equal(run(lambda *rest: -(weights * differentiable_log_probabilities(*rest)), inputs)[1:], loss[1:])
    torch.testing.assert_close(-(weights * chunked_log_probabilities(*inputs)).sum(), loss[0], rtol=1e-12, atol=0)


def test_log_probabilities_hold_a_chunk_of_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "ROWS", 10)
    largest = 0

    class Watch(TorchDispatchMode):
        """What every operation returns."""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, tensor.untyped_storage().nbytes() if isinstance(tensor, Tensor) else 0)
            return out

    hidden, weight, targets = draw(3, 500, hidden=4, vocabulary=90)
    with Watch():
        run(differentiable_log_probabilities, (hidden, weight, targets))
    assert largest < 500 * 90 * 8 / 2


def test_the_real_chunk_size_with_a_remainder() -> None:
    inputs = draw(1, cross_entropy.ROWS * 2 + 5)
    assert_equal(run(chunked_linear_cross_entropy, inputs), run(linear_cross_entropy, inputs))


@pytest.mark.usefixtures("small_chunks")
def test_chunked_gradient_equals_finite_differences() -> None:
    hidden, weight, targets = draw(4, 7)
    hidden.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: chunked_linear_cross_entropy(h, w, targets), (hidden, weight))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("wanted", ["hidden", "weight", "neither"])
def test_chunked_makes_only_the_gradients_that_are_wanted(wanted: str) -> None:
    hidden, weight, targets = draw(8, 7)
    expected = run(loss_by_hand, (hidden, weight, targets))
    hidden.requires_grad_(wanted == "hidden")
    weight.requires_grad_(wanted == "weight")
    loss = chunked_linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-9, atol=1e-9)
    assert loss.requires_grad == (wanted != "neither")
    if wanted != "neither":
        (0.3 * loss).backward()
    for leaf, name, gradient in ((hidden, "hidden", expected[1]), (weight, "weight", expected[2])):
        if name == wanted:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-9, atol=1e-9)
        else:
            assert leaf.grad is None


@KERNELS
def test_equal_logits_cost_the_logarithm_of_the_vocabulary(kernel: Version) -> None:
    loss = kernel(torch.zeros(5, 3), torch.ones(11, 3), torch.arange(5))
    assert math.isclose(loss.item(), 5 * math.log(11), rel_tol=1e-6)


@KERNELS
def test_huge_logits_do_not_overflow(kernel: Version) -> None:
    hidden, weight, targets = draw(2, 6)
    loss = kernel(1e4 * hidden.float(), weight.float(), targets)
    assert loss.isfinite()
