"""The dispatcher of experts that are spread over ranks, at the seam of `model.feed_forward`.

Legend: T tokens of this rank, K experts a token, N rows for this rank's experts, D hidden, E experts.
"""

from __future__ import annotations

from itertools import count
from typing import Literal, Protocol

import torch
from torch import Tensor

from abyssal.parallel.dispatch.exchange import Link, Traffic
from abyssal.parallel.dispatch.halves import Exchange, finish, start
from abyssal.parallel.dispatch.message import Fp8, Plain
from abyssal.parallel.dispatch.route import Back, Out, Route, State

Leg = Literal["dispatch", "combine", "dispatch_backward", "combine_backward"]


class Path(Protocol):
    """Which all-to-alls lie between a token and its experts."""

    @property
    def links(self) -> tuple[Link, ...]:
        """The link of each hop."""
        ...

    def plan(self, experts: Tensor, traffic: Traffic) -> tuple[Route, Tensor]:
        """Return the route of choices [T, K], and the rows that come to each expert of this rank: [E/R]."""
        ...


class ExpertParallelDispatcher:
    """Brings rows to experts on other ranks and back; drops none. One serves every layer.

    Every rank of the group must take part in every call, be it without a token, in the same order. `dispatch` and
    `combine` each are a start and a finish, which may be called apart; so may their backward passes where autograd is
    cut between them. The state is a dict of tensors at every border; what it holds beside goes through untouched.

    What goes to experts, rows in `dispatch` and their gradients in the backward pass of `combine`, may go in FP8; what
    comes from them keeps its type. The gradient of the rounding is that of the identity. As published (§3.3.3).

    `traffic` counts what this rank has sent, forward and backward apart.
    """

    def __init__(self, path: Path, *, fp8: bool = False) -> None:
        """Send along `path`; to experts in FP8, if asked for."""
        self._path, self._fp8 = path, fp8
        self._numbers = count()
        self._under_way: dict[int, Exchange] = {}  # between start and finish
        self.traffic: dict[Leg, Traffic] = {
            leg: Traffic() for leg in ("dispatch", "combine", "dispatch_backward", "combine_backward")
        }

    def dispatch(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> State:
        """Send each token to its experts.

        Args:
            hidden: [T, D]; T may differ from rank to rank, and be 0.
            weights: [T, K], routing weights in at least fp32.
            experts: [T, K] indices.

        Returns:
            `rows` [N, D] sorted by the experts of this rank, `row_weights` [N], `counts` [E/R], and the way back.
        """
        return self.finish_dispatch(self.start_dispatch(hidden, weights, experts))

    def combine(self, state: State) -> Tensor:
        """Bring the experts' `rows` back and sum those of each token: [T, D]."""
        return self.finish_combine(self.start_combine(state))

    def start_dispatch(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> State:
        """Plan the route, with one wait for other ranks and the device, and start sending."""
        route, counts = self._path.plan(experts, self.traffic["dispatch"])
        out = self._out(route, hidden, "dispatch")
        back = Back(route, self._path.links, self.traffic["dispatch_backward"])
        state = {**route.state(), "counts": counts}
        return self._start(Exchange(out, back), state, hidden, weights.flatten())

    def finish_dispatch(self, state: State) -> State:
        """Add `rows` and `row_weights`."""
        (rows, row_weights), kept = self._finish(state)
        return {**kept, "rows": rows, "row_weights": row_weights}

    def start_combine(self, state: State) -> State:
        """Start sending `rows` back."""
        rows = state["rows"]
        route = Route.of(state, len(self._path.links))
        back = Back(route, self._path.links, self.traffic["combine"])
        exchange = Exchange(back, self._out(route, rows, "combine_backward"))
        return self._start(exchange, {name: value for name, value in state.items() if name != "rows"}, rows)

    def finish_combine(self, state: State) -> Tensor:
        """Return the sum of each token's rows: [T, D]."""
        (rows,), _ = self._finish(state)
        return rows

    def _out(self, route: Route, rows: Tensor, leg: Leg) -> Out:
        encoding = Fp8(rows.shape[1], rows.dtype) if self._fp8 else Plain()
        return Out(route, self._path.links, encoding, self.traffic[leg])

    def _start(self, exchange: Exchange, state: State, rows: Tensor, *values: Tensor) -> State:
        ticket = start(exchange, rows, *values)
        number = next(self._numbers)
        self._under_way[number] = exchange
        return {**state, "ticket": ticket, "exchange": torch.tensor(number)}

    def _finish(self, state: State) -> tuple[tuple[Tensor, ...], State]:
        """Return what has arrived, and the rest of the state."""
        exchange = self._under_way.pop(int(state["exchange"]))
        kept = {name: value for name, value in state.items() if name not in ("ticket", "exchange")}
        return finish(exchange, state["ticket"]), kept
