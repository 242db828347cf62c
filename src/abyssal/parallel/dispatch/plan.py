"""The plan of one dispatch: which row goes to which rank, over one all-to-all or two.

An all-to-all takes items, rows of a tensor, to ranks of a group: an item as one row to each rank that it must reach, or
as one to each of its experts. Beside the rows go values of the (item, choice) pairs, the routing weights. On the way
back the rows of an item are summed, while values of pairs only return to their places. What the last all-to-all
delivers is then sorted by local expert.

Legend: n items, S rows sent, P pairs sent, R ranks of the group, N rows received by the last all-to-all, T tokens,
K experts a token, E experts of all ranks, e experts of this rank, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.ops.permute import inverse_order, sum_rows
from abyssal.parallel.dispatch.all_to_all import AsyncAllToAll, ExpertGroup, start_all_to_all
from abyssal.parallel.dispatch.volume import CommunicationVolume


class AllToAllPlan(NamedTuple):
    """One all-to-all; splits lie on the CPU, the other tensors where the rows are."""

    group: ExpertGroup
    rows: Tensor  # [S] the item that each row copies, by receiving rank
    row_places: Tensor  # [S] item after item, where its rows stand among those sent
    row_starts: Tensor  # [n] where each item begins in `row_places`
    row_splits: Tensor  # [2, R] rows to each rank, from each rank
    pairs: Tensor  # [P] the pair that each value sent belongs to, by receiving rank
    pair_places: Tensor  # [P] where each pair's value stands among those sent
    pair_splits: Tensor  # [2, R]

    def send(self, volume: CommunicationVolume, items: Tensor, *values: Tensor) -> list[AsyncAllToAll]:
        """Start to send items [n, ...] and values of pairs [P]."""
        rows = start_all_to_all(self.group, items.index_select(0, self.rows), self.row_splits, volume, rows=True)
        return [
            rows,
            *(start_all_to_all(self.group, v.index_select(0, self.pairs), self.pair_splits, volume) for v in values),
        ]

    def send_back(self, volume: CommunicationVolume, rows: Tensor, *values: Tensor) -> list[AsyncAllToAll]:
        """Start to send what belongs to rows and values that were received."""
        back = start_all_to_all(self.group, rows, self.row_splits.flip(0), volume, rows=True)
        return [back, *(start_all_to_all(self.group, v, self.pair_splits.flip(0), volume) for v in values)]

    def sum_items(self, rows: Tensor, *values: Tensor) -> list[Tensor]:
        """Sum the rows that came back for each item, [n, D], and put values in their places: [P]."""
        items = sum_rows(rows, self.row_places, self.row_starts)
        return [items, *(value.index_select(0, self.pair_places) for value in values)]


class DispatchPlan(NamedTuple):
    """All all-to-alls of one dispatch, and the order of experts behind the last."""

    all_to_alls: tuple[AllToAllPlan, ...]
    order: Tensor  # [N] which received row stands in each row sorted by local expert
    inverse: Tensor  # [N] in which sorted row each received one stands
    counts: Tensor  # [e] rows of each expert of this rank

    @classmethod
    def of(cls, all_to_alls: tuple[AllToAllPlan, ...], received: Tensor) -> DispatchPlan:
        """Add the order of experts.

        Args:
            received: [R, e], rows of each rank of the last all-to-all for each expert of this rank, in which order
                they are received.
        """
        ranks, experts = received.shape
        expert = torch.arange(experts, device=received.device).repeat(ranks)  # [R * e]
        rows = int(all_to_alls[-1].row_splits[1].sum())
        order = expert.repeat_interleave(received.flatten(), output_size=rows).argsort(stable=True)  # [N]
        return cls(all_to_alls, order, inverse_order(order), received.sum(0))
