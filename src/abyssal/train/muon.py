"""Muon: momentum whose direction is made orthogonal, for hidden matrices; an option beside the published AdamW.

Legend: L stacked matrices, A rows, B columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from abyssal.ranks.placements import local

#: Coefficients of the quintic iteration x -> ax + bx^3 + cx^5, chosen for a steep slope at zero: the singular values
#: end within about 0.7 to 1.2, not exactly at 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
#: Matrices of equal shape that are made orthogonal together: enough to fill a processor's threads, few enough to stay
#: near its cache.
BATCH = 16


@torch.no_grad()
def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix near 1 and keep its singular vectors, by Newton-Schulz iteration.

    Args:
        matrices: [L, A, B].

    Returns:
        [L, A, B] in the same dtype, in which the products are taken; scale and a zero matrix are without effect.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the smaller side's Gram matrix is the cheaper one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def orthogonalise_alike(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Make the matrices of many stacks [L, A, B] orthogonal, those of equal shape together; returns the same shapes."""
    alike = defaultdict[torch.Size, list[int]](list)
    for place, stack in enumerate(stacks):
        alike[stack.shape[-2:]].append(place)
    orthogonal: dict[int, Tensor] = {}
    for places in alike.values():
        matrices = torch.cat([stacks[place] for place in places]).split(BATCH)  # [L, A, B] each
        updates = torch.cat([orthogonalise(batch) for batch in matrices])
        orthogonal.update(zip(places, updates.split([len(stacks[place]) for place in places]), strict=True))
    return [orthogonal[place] for place in range(len(stacks))]


def cost(rows: int, columns: int) -> int:
    """Return multiply-adds of an iteration on one matrix: a a b for the Gram matrix, as much to apply it, a a a."""
    a, b = sorted((rows, columns))
    return 2 * a * a * b + a**3


#: Takes parts of parameters, and what to do with stacks of whole matrices [L, A, B]; returns the parts of the results.
OnWholeMatrices = Callable[[Sequence[Tensor], Callable[[Sequence[Tensor]], list[Tensor]]], list[Tensor]]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for matrices; dims before the last two stack independent ones.

    An update's root mean square is made 0.2, about that of AdamW's, by the factor 0.2 sqrt(max(A, B)), so learning
    rate and weight decay mean what they mean there. State: one momentum a parameter, as its gradient is: fp32, or
    fp64, and spread over ranks alike. Momentum and update are elementwise, so each rank makes those of its part of a
    parameter; what needs whole matrices goes through `matrix_exchange`.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        momentum: float,
        weight_decay: float,
        products: torch.dtype | None = None,
        matrix_exchange: OnWholeMatrices | None = None,
    ) -> None:
        """Take matrices, or groups of them, whose `lr` is set before each step.

        A group's `parts` says of how many matrices, one above the other, each of its matrices consists (2 for
        gate_up_proj); 1 if not given.

        Args:
            parameters: as for any optimizer of torch.
            momentum: of the gradients.
            weight_decay: over the learning rate.
            products: what matrices are rounded to before they are made orthogonal: bf16 is exact enough, where the
                machine has units for it; the parameters' dtype if not given.
            matrix_exchange: where ranks hold parts of the parameters: lets each whole matrix be worked on; it is given
                this rank's parts of all parameters, in the order of groups.
        """
        defaults = {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay, "parts": 1}
        super().__init__(parameters, defaults)
        self.products, self.matrix_exchange = products, matrix_exchange

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient, in place; `closure` is not supported."""
        assert closure is None, "Muon is stepped after the backward pass, without a closure"
        updates = self._by_group() if self.matrix_exchange is None else self._over_ranks(self.matrix_exchange)
        for group, parameter, update in updates:
            height, columns = parameter.shape[-2:]
            part, rows, lr = local(parameter), height // group["parts"], group["lr"]
            part.mul_(1.0 - lr * group["weight_decay"])
            part.add_(update, alpha=-lr * 0.2 * math.sqrt(max(rows, columns)))

    def _by_group(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Return group, parameter and update of every parameter, which is whole."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            stacks = []
            for parameter in parameters:
                height, columns = parameter.shape[-2:]
                ahead = self._look_ahead(parameter, group["momentum"])
                stacks.append(ahead.view(-1, height // group["parts"], columns))
            for parameter, update in zip(parameters, orthogonalise_alike(stacks), strict=True):
                yield group, parameter, update.view_as(parameter)

    def _over_ranks(self, matrix_exchange: OnWholeMatrices) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Return the same where ranks hold parts of parameters."""
        taken = [(group, p) for group in self.param_groups for p in group["params"]]
        ahead = [self._look_ahead(p, group["momentum"]) for group, p in taken]
        for (group, parameter), update in zip(taken, matrix_exchange(ahead, orthogonalise_alike), strict=True):
            if parameter.grad is not None:
                yield group, parameter, update

    def _look_ahead(self, parameter: Tensor, momentum: float) -> Tensor:
        """Take the gradient into the parameter's momentum and return Nesterov's look ahead, rounded for the products.

        Both as far as this rank holds the parameter; zeros without a gradient.
        """
        if parameter.grad is None:
            part = local(parameter)
            return torch.zeros_like(part, dtype=self.products)
        gradient, state = local(parameter.grad), self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter.grad)
        mean = local(state["momentum"]).lerp_(gradient, 1.0 - momentum)
        return gradient.lerp(mean, momentum).to(self.products or gradient.dtype)


def muon_tensors(optimizer: Muon, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a Muon's live state as {parameter name: {"momentum"}}, made as zeros where no step was taken yet."""
    for parameter in parameters.values():
        if not optimizer.state[parameter]:
            optimizer.state[parameter]["momentum"] = torch.zeros_like(parameter)
    return {name: dict(optimizer.state[parameter]) for name, parameter in parameters.items()}
