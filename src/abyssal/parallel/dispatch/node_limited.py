"""Node-limited dispatch: a row crosses to each node once, to one rank there, and goes on from it within the node.

A token goes to every other node that holds experts of its choice as one row, to the rank with this rank's index there,
its relay, with the list of its experts and their weights. The relay sends a row to each expert. On the way back the
relay adds up the experts' rows of a token, in fp32 or above inside, and one row crosses. Paper: §3.2.2.

Legend: T tokens, K experts a token, M = T * K pairs, E experts of all ranks, R ranks = N nodes * L ranks of a node,
S rows to relays, P pairs relayed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.ops.permute import expert_order, inverse_order
from abyssal.parallel.dispatch.all_to_all import ExpertGroup, exchange_counts, start_all_to_all
from abyssal.parallel.dispatch.plan import AllToAllPlan, DispatchPlan
from abyssal.parallel.dispatch.volume import CommunicationVolume


@dataclass(frozen=True)
class NodeLimitedPlanner:
    """Plans two all-to-alls, across nodes and within; rank r of `group` holds experts r * E/R up to (r + 1) * E/R."""

    group: ExpertGroup  # all R ranks, a node's L beside one another
    internode: ExpertGroup  # the ranks of this rank's index, one a node
    intranode: ExpertGroup  # the ranks of this rank's node
    num_experts: int

    def plan(self, experts: Tensor, volume: CommunicationVolume) -> DispatchPlan:
        """Plan for this rank's choices [T, K]; ranks exchange counts, which `volume` counts.

        Received rows of an expert stand in the order of their relays, those of a relay in that of their nodes.
        """
        nodes, on_node = self.internode.size, self.num_experts // self.internode.size
        node = experts // on_node  # [T, K]
        reached = node.new_zeros(len(node), nodes, dtype=torch.bool).scatter_(1, node, True)  # [T, N]
        load = expert_order(experts, self.num_experts)[2].view(nodes, on_node)  # [N, E/N]
        rows, pairs, forwarded, received = self._exchange_counts(load, reached.sum(0), volume)
        order, places, _ = expert_order(node, nodes)  # [M], by node, then token
        placed = _rows_to_nodes(reached, int(rows[0].sum()))
        to_nodes = AllToAllPlan(self.internode, *placed, rows, order, places, pairs)
        listed = _list_experts(experts, order, on_node)  # [M]
        relayed = start_all_to_all(self.internode, listed, pairs, volume).wait()  # [P]
        to_experts = _rows_to_experts(self.intranode, relayed, int(rows[1].sum()), forwarded)
        return DispatchPlan.of((to_nodes, to_experts), received)

    def _exchange_counts(
        self, load: Tensor, rows: Tensor, volume: CommunicationVolume
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Let every rank know how much will come to it, as a relay and as the holder of experts.

        Args:
            load: [N, E/N], pairs for each expert.
            rows: [N], rows for each node.
            volume: is added to.

        Returns:
            Splits on the CPU of rows to relays [2, N], of pairs to them [2, N] and of rows within the node [2, L]; and
            how many rows come through each relay for each expert of this rank: [L, E/R].
        """
        nodes, ranks = self.internode.size, self.intranode.size
        sent = torch.cat([load, rows[:, None]], 1)  # [N, E/N + 1]
        received = exchange_counts(self.group, sent.repeat_interleave(ranks, 0), volume)  # [R, E/N + 1]
        by_source = received.view(nodes, ranks, -1)
        relayed = by_source[:, self.intranode.rank]  # [N, E/N + 1] through this rank
        through = relayed[:, :-1]
        here = by_source[:, :, :-1].sum(0).view(ranks, ranks, -1)[:, self.intranode.rank]  # [L, E/R]
        splits = [
            torch.stack([rows, relayed[:, -1]]),
            torch.stack([load.sum(1), through.sum(1)]),
            torch.stack([through.sum(0).view(ranks, -1).sum(1), here.sum(1)]),
        ]
        read = torch.cat(splits, 1).cpu()  # the one wait for the device
        return *read.split([nodes, nodes, ranks], 1), here


def _rows_to_nodes(reached: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `rows`, `row_places` and `row_starts` of the all-to-all with a row of each token for each node it reaches.

    Args:
        reached: [T, N] bool.
        rows: S, how many are true.
    """
    token = torch.nonzero_static(reached.T, size=rows)[:, 1]  # [S], by node
    place = reached.T.flatten().cumsum(0).view(reached.T.shape) - 1  # [N, T]
    of_token, node = torch.nonzero_static(reached, size=rows).unbind(1)  # [S] each, by token
    each = reached.sum(1)  # [T]
    return token, place[node, of_token], each.cumsum(0) - each


def _list_experts(experts: Tensor, order: Tensor, on_node: int) -> Tensor:
    """Return a number for each pair [M], in `order`: its expert's place on the node, and whether it begins a row."""
    chosen = experts.flatten()[order]
    row = chosen // on_node * len(experts) + order // experts.shape[1]  # which token to which node
    begins = torch.ones_like(row)
    begins[1:] = row[1:] != row[:-1]
    return (chosen % on_node * 2 + begins).to(torch.int32)


def _rows_to_experts(group: ExpertGroup, relayed: Tensor, rows: int, splits: Tensor) -> AllToAllPlan:
    """Plan the all-to-all that takes relayed rows to their experts, whose list [P] came with them."""
    begins = relayed % 2
    order = (relayed // 2).argsort(stable=True)
    places = inverse_order(order)
    row = begins.cumsum(0) - 1  # [P]
    starts = torch.nonzero_static(begins, size=rows)[:, 0]  # [rows]
    return AllToAllPlan(group, row[order], places, starts, splits, order, places, splits)
