"""Muon against a step written out with a singular value decomposition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from abyssal.train.muon import Muon, orthogonalise, orthogonalise_alike


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 9, 31), (2, 40, 11)], ids=str)
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    """Of singular values within a factor of 10: five iterations do not bring a far smaller one up."""
    stack, rows, columns = shape
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)  # v is transposed already
    values = 0.1 + 0.9 * torch.rand(stack, min(rows, columns))
    found = orthogonalise(7.0 * u * values[:, None] @ v).float()
    ends = torch.linalg.svdvals(found)
    assert ends.min() > 0.6
    assert ends.max() < 1.25
    inner = u.mT @ found @ v.mT  # diagonal where the singular vectors are the same
    off_diagonal = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.norm() < 0.05 * inner.norm()


def test_matrices_of_a_stack_do_not_see_each_other() -> None:
    matrices = torch.randn(3, 8, 20)
    alone = torch.cat([orthogonalise(m[None]) for m in matrices])
    torch.testing.assert_close(orthogonalise(matrices).float(), alone.float(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32, torch.float64, None], ids=str)
def test_matrices_are_made_orthogonal_in_the_dtype_that_was_chosen(products: torch.dtype | None) -> None:
    given: list[torch.dtype] = []

    def exchange(parts: Any, work: Any) -> list[torch.Tensor]:
        given.extend(part.dtype for part in parts)
        return list(parts)

    parameters = [torch.nn.Parameter(torch.randn(5, 3)) for _ in range(2)]
    parameters[0].grad = torch.randn(5, 3)
    Muon(parameters, momentum=0.5, weight_decay=0.0, products=products, matrix_exchange=exchange).step()
    assert given == [products or torch.float32] * 2
    matrices = torch.randn(2, 9, 14, dtype=torch.float64)
    found = orthogonalise(matrices.to(products or torch.float32))
    assert found.dtype == (products or torch.float32)
    exact = orthogonalise(matrices)
    assert (found.double() - exact).norm() < (0.05 if products == torch.bfloat16 else 1e-5) * exact.norm()


def test_stacks_of_many_shapes_come_back_in_their_order() -> None:
    stacks = [torch.randn(shape, dtype=torch.float64) for shape in ((1, 4, 6), (20, 6, 4), (3, 4, 6), (2, 6, 4))]
    found = orthogonalise_alike(stacks)
    for stack, one in zip(stacks, found, strict=True):
        torch.testing.assert_close(one, orthogonalise(stack), rtol=0, atol=1e-12)
    assert orthogonalise_alike([]) == []


def test_whole_matrices_are_exchanged_at_the_seam() -> None:
    """What goes there is the look ahead of every parameter, in the order of groups; what comes back is applied."""
    first, second, idle = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 6), (2, 10, 3), (5, 7)))
    given: list[torch.Tensor] = []

    def exchange(parts: Any, work: Any) -> list[torch.Tensor]:
        given.extend(parts)
        return [torch.full_like(part, number) for number, part in enumerate(parts, 1)]

    groups = [{"params": [first, idle]}, {"params": [second], "parts": 2}]
    optimizer = Muon(groups, momentum=0.5, weight_decay=0.0, matrix_exchange=exchange)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    first.grad, second.grad = torch.ones_like(first), torch.full_like(second, 4.0)
    optimizer.step()
    assert [(tuple(part.shape), part.unique().item()) for part in given] == [
        ((4, 6), 0.75),
        ((5, 7), 0.0),
        ((2, 10, 3), 3.0),
    ]
    torch.testing.assert_close(first.detach(), torch.full_like(first, -0.1 * 0.2 * 6**0.5))
    torch.testing.assert_close(second.detach(), torch.full_like(second, -3 * 0.1 * 0.2 * 5**0.5))
    assert not idle.any()
    assert idle not in optimizer.state


def test_zero_gradient_moves_nothing_but_by_decay() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([weight], momentum=0.9, weight_decay=0.5)
    optimizer.param_groups[0]["lr"] = 0.1
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 6), 0.95))


def test_two_steps_equal_the_definition() -> None:
    """The gradients and momenta here are exact in fp32 in whatever order, so that both are rounded to the same bf16."""
    start, gradients = torch.randn(5, 16), [torch.randint(-64, 65, (5, 16)) / 8 for _ in range(2)]
    weight = torch.nn.Parameter(start.clone())
    optimizer = Muon([weight], momentum=0.75, weight_decay=0.1)
    momentum, expected = torch.zeros(5, 16), start.clone()
    for gradient, lr in zip(gradients, (0.02, 0.01), strict=True):
        optimizer.param_groups[0]["lr"] = 3 * lr
        weight.grad = gradient
        optimizer.step()
        momentum = 0.75 * momentum + 0.25 * gradient
        direction = 0.25 * gradient + 0.75 * momentum
        expected *= 1 - 3 * lr * 0.1
        expected -= 3 * lr * 0.2 * 4 * orthogonalise(direction[None])[0].float()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_update_has_the_size_that_learning_rates_are_tuned_for() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 24, 60))
    optimizer = Muon([weight], momentum=0.95, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 1.0
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_parts_of_a_matrix_are_made_orthogonal_apart() -> None:
    gradient = torch.randn(3, 10, 16)
    joint, first, second = (torch.nn.Parameter(torch.zeros(3, rows, 16)) for rows in (10, 5, 5))
    optimizer = Muon([{"params": [joint], "parts": 2}, {"params": [first, second]}], momentum=0.9, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    joint.grad, first.grad, second.grad = gradient, gradient[:, :5].clone(), gradient[:, 5:].clone()
    optimizer.step()
    torch.testing.assert_close(joint.detach(), torch.cat((first, second), 1).detach(), rtol=0, atol=1e-4)
