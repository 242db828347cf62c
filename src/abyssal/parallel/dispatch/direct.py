"""The direct path: each (token, choice) pair is a row, sent to the rank that holds its expert.

Legend: T tokens, K experts a token, M = T * K rows sent, N rows received, R ranks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.ops.permute import expert_order, inverse_order
from abyssal.parallel.dispatch.exchange import Link, Traffic, send_evenly
from abyssal.parallel.dispatch.route import Hop, Route


@dataclass(frozen=True)
class DirectPath:
    """Routes over one all-to-all; rank r of the link holds experts r * E/R up to (r + 1) * E/R."""

    link: Link
    num_experts: int

    @property
    def links(self) -> tuple[Link, ...]:
        """The link of each hop."""
        return (self.link,)

    def plan(self, experts: Tensor, traffic: Traffic) -> tuple[Route, Tensor]:
        """Return the route of this rank's choices [T, K], and the rows that come to each of its experts: [E/R].

        Received rows of an expert stand in the order of their ranks, those of a rank in the order of its tokens.
        """
        tokens, top_k = experts.shape
        order, places, load = expert_order(experts, self.num_experts)  # [M], [M], [E]
        leaving = load.view(self.link.size, -1)  # [R, E/R]
        arriving = send_evenly(self.link, leaving, traffic)  # [R, E/R] of each rank, for each expert here
        splits = torch.stack([leaving.sum(1), arriving.sum(1)]).cpu()  # the one wait for the device
        starts = torch.arange(0, tokens * top_k, top_k, device=experts.device)  # [T]
        hop = Hop(order // top_k, places, starts, splits, order, places, splits)
        by_expert = order_by_expert(arriving, int(splits[1].sum()))
        return Route((hop,), by_expert, inverse_order(by_expert)), arriving.sum(0)


def order_by_expert(arriving: Tensor, rows: int) -> Tensor:
    """Return the stable order by expert [N] of rows that are sorted by rank and, within a rank, by expert.

    Args:
        arriving: [R, E/R], rows of each rank and expert.
        rows: N, their sum.
    """
    ranks, experts = arriving.shape
    expert = torch.arange(experts, device=arriving.device).repeat(ranks)  # [R * E/R]
    return expert.repeat_interleave(arriving.flatten(), output_size=rows).argsort(stable=True)
