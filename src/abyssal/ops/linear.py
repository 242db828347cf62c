"""y = x W^T, the product behind every projection: a weight cast once for many products, dW at once or later.

Legend: M rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Product = Callable[[], Tensor]


class WeightGradients:
    """Weight gradients that a backward pass has left for later, as the products that make them.

    A pipeline needs the gradient of a micro-batch's input at once, to send it on, and has time for those of the weights
    where it would wait otherwise (ZB1P, DualPipe). It hands one store to all weights of a stage, takes out of it what
    each backward pass has put in, and runs that when it suits:

        deferred = WeightGradients()
        prepare_weights(model, deferred)  # abyssal.model.prepared
        loss_of(model, micro_batch).backward()  # gradients of inputs, norms and routers
        later = deferred.take()
        ...  # other micro-batches
        later.run()  # each product once: now the weights have the gradients of this micro-batch

    What is not run holds the rows that it multiplies. Paper: §3.2.1.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._waiting: list[tuple[Tensor, Product]] = []

    def __len__(self) -> int:
        """How many products wait."""
        return len(self._waiting)

    def put(self, weight: Tensor, product: Product) -> None:
        """Leave the gradient of `weight`, a parameter or a view of one, to `product`."""
        self._waiting.append((weight, product))

    def take(self) -> Self:
        """Return all that wait, in a store of their own; none wait here any more."""
        taken = type(self)()
        taken._waiting, self._waiting = self._waiting, []
        return taken

    def run(self) -> None:
        """Make every gradient that waits, in the order of the backward pass, and add each to its parameter's."""
        waiting, self._waiting = self._waiting, []
        for weight, product in waiting:
            with torch.no_grad():
                gradient = product()
            torch.autograd.backward(weight, gradient)


def linear(x: Tensor, weight: Tensor, deferred: WeightGradients | None = None) -> Tensor:
    """The definition: x W^T.

    Args:
        x: [M, I].
        weight: [O, I] in x's dtype.
        deferred: where the backward pass leaves the product dW = dY^T X; none: it is made there and then. Where x takes
            no gradient there is no backward pass without dW, and nothing is left.

    Returns:
        [M, O] in x's dtype; accumulated in at least fp32.
    """
    if deferred is None or not x.requires_grad:
        return F.linear(x, weight)
    return _InputGradient.apply(x, weight.detach(), partial(deferred.put, weight))  # type: ignore[no-any-return, no-untyped-call]


class _InputGradient(torch.autograd.Function):
    """The product whose backward returns dX only; autograd does not see the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, put: Callable[[Product], None]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.put = put
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        ctx.put(partial(torch.mm, grad.T, x))  # [O, I]
        return torch.mm(grad, weight), None, None


class _InPlaceOf(torch.autograd.Function):
    """Gives out `values` for `weight`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class CastWeight:
    """A weight in the dtype of the products, cast once; the gradient of each product goes to the weight itself.

    Called with rows it is the product. The cast does not follow the weight: it is good until the weight changes.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, deferred: WeightGradients | None = None) -> None:
        """Cast `weight` [..., O, I]; without a copy where it has the dtype. See `linear` for `deferred`."""
        self.weight, self.deferred = weight, deferred
        self.values = weight.detach().to(dtype)

    @property
    def tensor(self) -> Tensor:
        """The values, of which autograd hands the gradient to the weight, in the weight's dtype."""
        if self.weight.dtype == self.values.dtype:
            return self.weight
        return _InPlaceOf.apply(self.weight, self.values)  # type: ignore[no-any-return, no-untyped-call]

    def __call__(self, x: Tensor) -> Tensor:
        """Map [M, I] to [M, O]."""
        return linear(x, self.tensor, self.deferred)
