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


def cast_once(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `weight` in `dtype`, for many products; itself where it has the dtype.

    The result does not follow the weight, so it is good until the weight changes. Every gradient that reaches it is
    handed on to the weight: a leaf adds up what one backward pass brings, in the weight's dtype.
    """
    if weight.dtype == dtype:
        return weight
    values = weight.detach().to(dtype)
    if weight.requires_grad:
        values.requires_grad_().grad_dtype = weight.dtype
        values.register_post_accumulate_grad_hook(partial(_hand_on, weight))
    return values


def _hand_on(weight: Tensor, values: Tensor) -> None:
    gradient, values.grad = values.grad, None
    weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)  # type: ignore[arg-type]


class CastWeight:
    """The product with a weight that is cast once; see `cast_once` and `linear`."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, deferred: WeightGradients | None = None) -> None:
        """Cast `weight` [O, I]; `deferred` takes its gradient's products."""
        self.weight, self.deferred = cast_once(weight, dtype), deferred

    def __call__(self, x: Tensor) -> Tensor:
        """Map [M, I] to [M, O]."""
        return linear(x, self.weight, self.deferred)
