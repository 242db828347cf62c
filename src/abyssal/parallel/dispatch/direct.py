"""Direct dispatch: each (token, choice) pair is a row, sent to the rank that holds its expert.

Legend: T tokens, K experts a token, M = T * K rows sent, R ranks, E experts of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.ops.permute import expert_order
from abyssal.parallel.dispatch.all_to_all import ExpertGroup, exchange_counts
from abyssal.parallel.dispatch.plan import AllToAllPlan, DispatchPlan
from abyssal.parallel.dispatch.volume import CommunicationVolume


@dataclass(frozen=True)
class DirectPlanner:
    """Plans one all-to-all in the expert group, whose rank r holds experts r * E/R up to (r + 1) * E/R."""

    group: ExpertGroup
    num_experts: int

    def plan(self, experts: Tensor, volume: CommunicationVolume) -> DispatchPlan:
        """Plan for this rank's choices [T, K]; ranks exchange counts, which `volume` counts.

        Received rows of an expert stand in the order of their ranks, those of a rank in the order of its tokens.
        """
        tokens, top_k = experts.shape
        order, places, load = expert_order(experts, self.num_experts)  # [M], [M], [E]
        sent = load.view(self.group.size, -1)  # [R, E/R]
        received = exchange_counts(self.group, sent, volume)  # [R, E/R] of each rank, for each expert here
        splits = torch.stack([sent.sum(1), received.sum(1)]).cpu()  # the one wait for the device
        starts = torch.arange(0, tokens * top_k, top_k, device=experts.device)  # [T]
        all_to_all = AllToAllPlan(self.group, order // top_k, places, starts, splits, order, places, splits)
        return DispatchPlan.of((all_to_all,), received)
