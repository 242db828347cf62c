"""Cross entropy against a loop over tokens, and its chunked version against it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from abyssal.ops import cross_entropy
from abyssal.ops.cross_entropy import CrossEntropy, chunked_linear_cross_entropy, linear_cross_entropy

KERNELS = [linear_cross_entropy, chunked_linear_cross_entropy]


def by_hand(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-sum_t log of the softmax at the target, one token at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for h, target in zip(hidden, targets.tolist(), strict=True):
        logits = [(row * h).sum() for row in weight]
        largest = max(x.item() for x in logits)
        partition = sum((torch.exp(x - largest) for x in logits[1:]), torch.exp(logits[0] - largest))
        total = total - (logits[target] - largest - torch.log(partition))
    return total


def draw(seed: int, tokens: int, hidden: int = 4, vocabulary: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocabulary, hidden, dtype=torch.float64, generator=generator)
    return h, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def run(kernel: CrossEntropy, inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return loss and gradients in float64; the head stays in at least fp32, as in training with fp32 masters."""
    hidden, weight, targets = inputs
    hidden = hidden.to(dtype).detach().requires_grad_()
    weight = weight.to(torch.promote_types(dtype, torch.float32)).detach().requires_grad_()
    loss = kernel(hidden, weight, targets)
    assert loss.dtype == weight.dtype
    gradients = torch.autograd.grad(0.3 * loss, (hidden, weight))
    assert [g.dtype for g in gradients] == [hidden.dtype, weight.dtype]
    return [x.detach().double() for x in (loss, *gradients)]


@pytest.fixture
def three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy._ChunkedCrossEntropy, "ROWS", 3)


@pytest.mark.usefixtures("three_rows")
@pytest.mark.parametrize("tokens", [1, 3, 6, 8])
@pytest.mark.parametrize("kernel", KERNELS)
def test_cross_entropy_equals_the_definition(kernel: CrossEntropy, tokens: int) -> None:
    inputs = draw(tokens, tokens)
    for actual, oracle in zip(run(kernel, inputs, torch.float64), run(by_hand, inputs, torch.float64), strict=True):
        torch.testing.assert_close(actual, oracle, rtol=1e-9, atol=1e-9)


def test_the_real_chunk_size_with_a_remainder() -> None:
    inputs = draw(1, cross_entropy._ChunkedCrossEntropy.ROWS * 2 + 5)
    for actual, oracle in zip(
        run(chunked_linear_cross_entropy, inputs, torch.float64),
        run(linear_cross_entropy, inputs, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(actual, oracle, rtol=1e-9, atol=1e-9)


# bf16 logits keep 8 bits: a logit of size 4 is off by up to 2^-7
@pytest.mark.usefixtures("three_rows")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_lower_precision_is_within_tolerance(kernel: CrossEntropy, dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, targets = draw(6, 41, hidden=24, vocabulary=31)
    inputs = (hidden.to(dtype).double(), (weight / 5).to(dtype).double(), targets)
    exact = run(linear_cross_entropy, inputs, torch.float64)
    for actual, oracle in zip(run(kernel, inputs, dtype), exact, strict=True):
        torch.testing.assert_close(actual, oracle, rtol=0, atol=tolerance * oracle.abs().max().item())


@pytest.mark.usefixtures("three_rows")
def test_chunked_gradient_equals_finite_differences() -> None:
    hidden, weight, targets = draw(4, 7)
    hidden.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: chunked_linear_cross_entropy(h, w, targets), (hidden, weight))


@pytest.mark.usefixtures("three_rows")
@pytest.mark.parametrize("wanted", ["hidden", "weight", "neither"])
def test_chunked_makes_only_the_gradients_that_are_wanted(wanted: str) -> None:
    hidden, weight, targets = draw(8, 7)
    expected = run(by_hand, (hidden, weight, targets), torch.float64)
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


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_logits_cost_the_logarithm_of_the_vocabulary(kernel: CrossEntropy) -> None:
    loss = kernel(torch.zeros(5, 3), torch.ones(11, 3), torch.arange(5))
    assert math.isclose(loss.item(), 5 * math.log(11), rel_tol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_huge_logits_do_not_overflow(kernel: CrossEntropy) -> None:
    hidden, weight, targets = draw(2, 6)
    loss = kernel(1e4 * hidden.float(), weight.float(), targets)
    assert loss.isfinite()
