"""Rows to their experts and back, each an asynchronous transfer that autograd may be cut in the middle of.

The two are each other's gradient: gradients of what went to experts come back, those of what came back go out. The
gradient of `finish` starts the transfer back and that of `start` finishes it, so whoever runs the two as autograd calls
of their own, as a pipeline does, can compute between them in both directions. torch's own differentiable all-to-all
waits inside its backward pass. What autograd sees pass from `start` to `finish` is a ticket without elements: the
buffers in flight are in nobody's hands who might copy them too early.

Legend: T tokens, D hidden, N rows for this rank's experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from abyssal.model.dispatcher import InFlight
from abyssal.parallel.dispatch.all_to_all import AsyncAllToAll
from abyssal.parallel.dispatch.payload import Payload
from abyssal.parallel.dispatch.plan import DispatchPlan
from abyssal.parallel.dispatch.volume import CommunicationVolume


@dataclass
class ToExperts:
    """Rows to their experts; between `start` and `finish` the first all-to-all is in flight, the one across nodes."""

    plan: DispatchPlan
    payload: Payload
    volume: CommunicationVolume  # is added to
    in_flight: list[AsyncAllToAll] = field(default_factory=list)

    def start(self, rows: Tensor, *values: Tensor) -> None:
        """Start with rows [T, D] and values of (token, choice) pairs."""
        self.in_flight = self.plan.all_to_alls[0].send(self.volume, self.payload.encode(rows), *values)

    def finish(self) -> tuple[Tensor, ...]:
        """Wait, and return rows [N, D] and values [N], sorted by local expert."""
        in_flight, self.in_flight = self.in_flight, []
        for all_to_all in self.plan.all_to_alls[1:]:
            in_flight = all_to_all.send(self.volume, *(one.wait() for one in in_flight))
        payload, *values = (one.wait().index_select(0, self.plan.order) for one in in_flight)
        return self.payload.decode(payload), *values


@dataclass
class FromExperts:
    """Rows from their experts, in the dtype they have; the all-to-all across nodes is in flight until `finish`."""

    plan: DispatchPlan
    volume: CommunicationVolume  # is added to
    in_flight: list[AsyncAllToAll] = field(default_factory=list)

    def start(self, rows: Tensor, *values: Tensor) -> None:
        """Start with rows [N, D] and values [N], sorted by local expert."""
        first, *others = self.plan.all_to_alls
        tensors = [tensor.index_select(0, self.plan.inverse) for tensor in (rows, *values)]
        for all_to_all in reversed(others):
            in_flight = all_to_all.send_back(self.volume, *tensors)
            tensors = all_to_all.sum_items(*(one.wait() for one in in_flight))
        self.in_flight = first.send_back(self.volume, *tensors)

    def finish(self) -> tuple[Tensor, ...]:
        """Wait, and return the sum of each token's rows [T, D], and the values in their places."""
        in_flight, self.in_flight = self.in_flight, []
        return tuple(self.plan.all_to_alls[0].sum_items(*(one.wait() for one in in_flight)))


@dataclass(frozen=True)
class AsyncHandle:
    """A dispatch or combine in flight: its plan, its transfer, and the one that takes the gradients back."""

    plan: DispatchPlan
    forward: ToExperts | FromExperts
    backward: ToExperts | FromExperts


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: AsyncHandle, rows: Tensor, *values: Tensor) -> Tensor:
        ctx.handle = handle
        handle.forward.start(rows, *values)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.handle.backward.finish()


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: AsyncHandle, ticket: Tensor) -> tuple[Tensor, ...]:
        ctx.handle = handle
        return handle.forward.finish()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.handle.backward.start(*grads)
        return None, grads[0].new_empty(0)


def start(handle: AsyncHandle, rows: Tensor, *values: Tensor) -> InFlight:
    """Start the transfer of `handle`."""
    ticket: Tensor = _Start.apply(handle, rows, *values)  # type: ignore[no-untyped-call]
    return InFlight((ticket,), handle)


def finish(in_flight: InFlight) -> tuple[Tensor, ...]:
    """Finish what `start` started: the rows and values received."""
    return _Finish.apply(in_flight.handle, *in_flight.tickets)  # type: ignore[no-any-return, no-untyped-call]
