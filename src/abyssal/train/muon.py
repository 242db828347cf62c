"""Muon: momentum whose direction is made orthogonal, for hidden matrices; an option beside the published AdamW.

Legend: L stacked matrices, A rows, B columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

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
        [L, A, B] in bf16, in which the products are taken; scale and a zero matrix are without effect.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the smaller side's Gram matrix is the cheaper one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for matrices; dims before the last two stack independent ones.

    An update's root mean square is made 0.2, about that of AdamW's, by the factor 0.2 sqrt(max(A, B)), so learning
    rate and weight decay mean what they mean there. State: one momentum a parameter, fp32.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        momentum: float,
        weight_decay: float,
    ) -> None:
        """Take matrices, or groups of them, whose `lr` is set before each step.

        A group's `parts` says of how many matrices, one above the other, each of its matrices consists (2 for
        gate_up_proj); 1 if not given.
        """
        defaults = {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay, "parts": 1}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient, in place; `closure` is not supported."""
        assert closure is None, "Muon is stepped after the backward pass, without a closure"
        for group in self.param_groups:
            lr, alike = group["lr"], defaultdict[tuple[int, ...], list[Tensor]](list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape[-2:]].append(parameter)
            for (height, columns), parameters in alike.items():
                rows = height // group["parts"]
                directions = [self._momentum(p, group["momentum"]).view(-1, rows, columns) for p in parameters]
                matrices = torch.cat(directions).split(BATCH)  # [L, A, B] each
                updates = torch.cat([orthogonalise(batch) for batch in matrices])
                for parameter, update in zip(parameters, updates.split([len(d) for d in directions]), strict=True):
                    parameter.mul_(1.0 - lr * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-lr * 0.2 * math.sqrt(max(rows, columns)))

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """Take the gradient into the parameter's momentum and return Nesterov's look ahead, rounded to bf16."""
        gradient: Tensor = parameter.grad  # type: ignore[assignment]
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1.0 - momentum)
        return gradient.lerp(state["momentum"], momentum).to(torch.bfloat16)


def muon_tensors(optimizer: Muon, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a Muon's live state as {parameter name: {"momentum"}}, made as zeros where no step was taken yet."""
    for parameter in parameters.values():
        if not optimizer.state[parameter]:
            optimizer.state[parameter]["momentum"] = torch.zeros_like(parameter)
    return {name: dict(optimizer.state[parameter]) for name, parameter in parameters.items()}
