"""A transfer that autograd may be cut in the middle of: start and finish, forward and backward.

The gradient of `finish` starts the transfer back and that of `start` finishes it, so whoever runs the two as autograd
calls of their own, as a pipeline does, can compute between them in both directions. torch's own differentiable
all-to-all waits inside its backward. What autograd sees pass from one half to the other is a ticket without elements:
the buffers under way are in nobody's hands who might copy them too early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Way(Protocol):
    """A transfer in two halves."""

    def start(self, rows: Tensor, *values: Tensor) -> None:
        """Begin."""
        ...

    def finish(self) -> tuple[Tensor, ...]:
        """Return what has arrived."""
        ...


@dataclass(frozen=True)
class Exchange:
    """A transfer and the one that takes its gradients back."""

    forward: Way
    backward: Way


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, rows: Tensor, *values: Tensor) -> Tensor:
        ctx.exchange = exchange
        exchange.forward.start(rows, *values)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.backward.finish()


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, ticket: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.forward.finish()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.exchange.backward.start(*grads)
        return None, grads[0].new_empty(0)


def start(exchange: Exchange, rows: Tensor, *values: Tensor) -> Tensor:
    """Start `exchange` and return the ticket that `finish` takes: [0]."""
    return _Start.apply(exchange, rows, *values)  # type: ignore[no-any-return, no-untyped-call]


def finish(exchange: Exchange, ticket: Tensor) -> tuple[Tensor, ...]:
    """Finish `exchange`: the rows and values that have arrived."""
    return _Finish.apply(exchange, ticket)  # type: ignore[no-any-return, no-untyped-call]
