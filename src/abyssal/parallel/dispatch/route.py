"""The way of rows to experts on other ranks and back, over one all-to-all or several.

A hop takes items, rows of a tensor, to ranks of a group: an item as one row to each rank that it must reach, or as one
to each of its experts. Beside the rows go values of the (item, choice) pairs, the routing weights. On the way back the
rows of an item are summed, values of pairs only find their places again. After the last hop rows are sorted by local
expert.

Out and back are each other's gradient: gradients of what went out come back, and of what came back go out.

Legend: n items, S rows sent, P pairs sent, R ranks of the group, N rows received by the last hop, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

from torch import Tensor

from abyssal.ops.permute import sum_rows
from abyssal.parallel.dispatch.exchange import Link, Traffic, Transfer, send
from abyssal.parallel.dispatch.message import Encoding

State = dict[str, Tensor]


class Hop(NamedTuple):
    """One all-to-all as tensors; splits lie on the CPU, the others where the rows are."""

    rows: Tensor  # [S] the item that each row copies, by receiving rank
    row_places: Tensor  # [S] item after item, where its rows stand among those sent
    row_starts: Tensor  # [n] where each item begins in `row_places`
    row_splits: Tensor  # [2, R] rows to each rank, from each rank
    pairs: Tensor  # [P] the pair that each value sent belongs to, by receiving rank
    pair_places: Tensor  # [P] where each pair's value stands among those sent
    pair_splits: Tensor  # [2, R]

    def send(self, link: Link, traffic: Traffic, items: Tensor, *values: Tensor) -> list[Transfer]:
        """Begin to send items [n, ...] and values of pairs [P]."""
        rows = send(link, items.index_select(0, self.rows), self.row_splits, traffic, rows=True)
        return [rows, *(send(link, value.index_select(0, self.pairs), self.pair_splits, traffic) for value in values)]

    def send_back(self, link: Link, traffic: Traffic, rows: Tensor, *values: Tensor) -> list[Transfer]:
        """Begin to send what belongs to rows and values that were received."""
        back = send(link, rows, self.row_splits.flip(0), traffic, rows=True)
        return [back, *(send(link, value, self.pair_splits.flip(0), traffic) for value in values)]

    def gather(self, rows: Tensor, *values: Tensor) -> list[Tensor]:
        """Sum what came back for each item, [n, D], and put values in their places: [P]."""
        items = sum_rows(rows, self.row_places, self.row_starts)
        return [items, *(value.index_select(0, self.pair_places) for value in values)]


class Route(NamedTuple):
    """All hops of one dispatch, and the order of experts behind the last."""

    hops: tuple[Hop, ...]
    order: Tensor  # [N] which received row stands in each row sorted by local expert
    places: Tensor  # [N] in which sorted row each received one stands

    def state(self) -> State:
        """Return every tensor under a name of its own."""
        named = {f"hop_{i}_{name}": value for i, hop in enumerate(self.hops) for name, value in hop._asdict().items()}
        return {**named, "arrival_order": self.order, "arrival_places": self.places}

    @classmethod
    def of(cls, state: State, num_hops: int) -> Self:
        """Return the route that `state` was made from."""
        hops = (Hop(**{name: state[f"hop_{i}_{name}"] for name in Hop._fields}) for i in range(num_hops))
        return cls(tuple(hops), state["arrival_order"], state["arrival_places"])


class Out:
    """Rows to their experts; between `start` and `finish` the first hop is under way, the one to other nodes."""

    def __init__(self, route: Route, links: Sequence[Link], encoding: Encoding, traffic: Traffic) -> None:
        """Go over `links`, one a hop; add to `traffic`."""
        self._route, self._links, self._encoding, self._traffic = route, links, encoding, traffic
        self._under_way: list[Transfer] = []

    def start(self, rows: Tensor, *values: Tensor) -> None:
        """Begin with rows [T, D] and values of pairs."""
        self._under_way = self._send(0, self._encoding.encode(rows), *values)

    def finish(self) -> tuple[Tensor, ...]:
        """Return rows [N, D] and values [N], sorted by local expert."""
        under_way, self._under_way = self._under_way, []
        for hop in range(1, len(self._links)):
            under_way = self._send(hop, *(transfer.wait() for transfer in under_way))
        message, *values = (transfer.wait().index_select(0, self._route.order) for transfer in under_way)
        return self._encoding.decode(message), *values

    def _send(self, hop: int, message: Tensor, *values: Tensor) -> list[Transfer]:
        return self._route.hops[hop].send(self._links[hop], self._traffic, message, *values)


class Back:
    """Rows from their experts, in the type they have; between `start` and `finish` the first hop is under way."""

    def __init__(self, route: Route, links: Sequence[Link], traffic: Traffic) -> None:
        """Go back over `links`; add to `traffic`."""
        self._route, self._links, self._traffic = route, links, traffic
        self._under_way: list[Transfer] = []

    def start(self, rows: Tensor, *values: Tensor) -> None:
        """Begin with rows [N, D] and values [N], sorted by local expert."""
        tensors = [tensor.index_select(0, self._route.places) for tensor in (rows, *values)]
        for number, (hop, link) in reversed(list(enumerate(zip(self._route.hops, self._links, strict=True)))):
            self._under_way = hop.send_back(link, self._traffic, *tensors)
            if number > 0:
                tensors = hop.gather(*(transfer.wait() for transfer in self._under_way))

    def finish(self) -> tuple[Tensor, ...]:
        """Return the sum of each token's rows [T, D], and the values in their places."""
        under_way, self._under_way = self._under_way, []
        return tuple(self._route.hops[0].gather(*(transfer.wait() for transfer in under_way)))
