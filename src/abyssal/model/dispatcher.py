"""Rows to their experts and back: the seam between a router and its experts, where expert parallelism puts its
all-to-alls.

Dispatch and combine each are a start, which sends, and a finish, which waits, so that other work fits between the two.

Legend: T packed tokens, D hidden, E experts that live here, K experts a token, M rows for these experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from abyssal.ops.permute import expert_order, from_experts, to_experts


class InFlight(NamedTuple):
    """A dispatch or combine between its start and its finish."""

    tickets: tuple[Tensor, ...]  # what autograd sees pass from the start to the finish; empty tensors will do
    handle: Any = None  # the dispatcher's own: its buffers, and what it waits for


class ExpertRows(NamedTuple):
    """What has come to the experts."""

    rows: Tensor  # [M, D] sorted by expert
    row_weights: Tensor  # [M] routing weights, in at least fp32
    counts: Tensor  # [E] rows of each expert
    origin: Any  # the dispatcher's own: how the rows find back to their tokens


class Dispatcher(Protocol):
    """Brings tokens to their experts, wherever these live, and their outputs back."""

    def start_dispatch(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> InFlight:
        """Start to send tokens [T, D] to their experts [T, K], with their routing weights [T, K]."""
        ...

    def finish_dispatch(self, in_flight: InFlight) -> ExpertRows:
        """Wait for the rows of the experts that live here."""
        ...

    def start_combine(self, rows: Tensor, origin: Any) -> InFlight:
        """Start to send the experts' outputs [M, D] back to where the rows came from."""
        ...

    def finish_combine(self, in_flight: InFlight) -> Tensor:
        """Wait for the outputs and return each token's sum: [T, D]."""
        ...


class LocalDispatcher:
    """Brings rows to experts that all live here, by a sort; there is nothing to wait for."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        """Serve `num_experts` experts, `top_k` a token."""
        self.num_experts, self.top_k = num_experts, top_k

    def start_dispatch(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> InFlight:
        """Sort the (token, choice) pairs by expert."""
        order, inverse, counts = expert_order(experts, self.num_experts)
        rows = to_experts(hidden, order, inverse, self.top_k)  # [M, D]
        return InFlight((rows, weights.flatten()[order]), handle=(counts, (order, inverse)))

    def finish_dispatch(self, in_flight: InFlight) -> ExpertRows:
        """Return the sorted rows."""
        return ExpertRows(*in_flight.tickets, *in_flight.handle)

    def start_combine(self, rows: Tensor, origin: tuple[Tensor, Tensor]) -> InFlight:
        """Sum each token's rows: [M, D] -> [T, D]."""
        order, inverse = origin
        return InFlight((from_experts(rows, order, inverse, self.top_k),))

    def finish_combine(self, in_flight: InFlight) -> Tensor:
        """Return the sums."""
        return in_flight.tickets[0]
