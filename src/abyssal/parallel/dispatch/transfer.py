"""Rows to their experts and back, each an asynchronous transfer that autograd may be cut in the middle of.

The two are each other's gradient: gradients of what went to experts come back, those of what came back go out. The
gradient of `finish` starts the transfer back and that of `start` finishes it, so whoever runs the two as autograd calls
of their own, as a pipeline does, can compute between them in both directions. torch's own differentiable all-to-all
waits inside its backward pass. What autograd sees pass from `start` to `finish` is a ticket without elements: the
buffers in flight are in nobody's hands who might copy them too early.

Legend: T tokens, D hidden, N rows for this rank's experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from abyssal.model.dispatcher import InFlight
from abyssal.parallel.dispatch.all_to_all import AsyncAllToAll
from abyssal.parallel.dispatch.payload import PayloadFormat
from abyssal.parallel.dispatch.plan import DispatchPlan
from abyssal.parallel.dispatch.volume import CommunicationVolume


class AsyncTransfer(Protocol):
    """Sends when started, waits when finished."""

    def start(self, rows: Tensor, *values: Tensor) -> None:
        """Start to send rows, and values of (token, choice) pairs."""
        ...

    def finish(self) -> tuple[Tensor, ...]:
        """Wait, and return the rows and values received."""
        ...


class ToExperts:
    """Rows to their experts; between `start` and `finish` the first all-to-all is in flight, the one across nodes."""

    def __init__(self, plan: DispatchPlan, payload: PayloadFormat, volume: CommunicationVolume) -> None:
        """Send as `payload`; add to `volume`."""
        self._plan, self._payload, self.volume = plan, payload, volume
        self._in_flight: list[AsyncAllToAll] = []

    def start(self, rows: Tensor, *values: Tensor) -> None:
        """Start with rows [T, D] and values of pairs."""
        self._in_flight = self._plan.all_to_alls[0].send(self.volume, self._payload.encode(rows), *values)

    def finish(self) -> tuple[Tensor, ...]:
        """Return rows [N, D] and values [N], sorted by local expert."""
        in_flight, self._in_flight = self._in_flight, []
        for all_to_all in self._plan.all_to_alls[1:]:
            in_flight = all_to_all.send(self.volume, *(one.wait() for one in in_flight))
        payload, *values = (one.wait().index_select(0, self._plan.order) for one in in_flight)
        return self._payload.decode(payload), *values


class FromExperts:
    """Rows from their experts, in the dtype they have; the all-to-all across nodes is in flight until `finish`."""

    def __init__(self, plan: DispatchPlan, volume: CommunicationVolume) -> None:
        """Go the way of `plan` back; add to `volume`."""
        self._plan, self.volume = plan, volume
        self._in_flight: list[AsyncAllToAll] = []

    def start(self, rows: Tensor, *values: Tensor) -> None:
        """Start with rows [N, D] and values [N], sorted by local expert."""
        first, *others = self._plan.all_to_alls
        tensors = [tensor.index_select(0, self._plan.inverse) for tensor in (rows, *values)]
        for all_to_all in reversed(others):
            in_flight = all_to_all.send_back(self.volume, *tensors)
            tensors = all_to_all.sum_items(*(one.wait() for one in in_flight))
        self._in_flight = first.send_back(self.volume, *tensors)

    def finish(self) -> tuple[Tensor, ...]:
        """Return the sum of each token's rows [T, D], and the values in their places."""
        in_flight, self._in_flight = self._in_flight, []
        return tuple(self._plan.all_to_alls[0].sum_items(*(one.wait() for one in in_flight)))


@dataclass(frozen=True)
class AsyncHandle:
    """A dispatch or combine in flight: its plan, its transfer, and the one that takes the gradients back."""

    plan: DispatchPlan
    forward: AsyncTransfer
    backward: AsyncTransfer


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
