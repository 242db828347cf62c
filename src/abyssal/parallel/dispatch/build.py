"""From a recipe to the dispatcher of its experts."""

from __future__ import annotations

import torch.distributed as dist

from abyssal.config.parallel import ParallelConfig
from abyssal.parallel.dispatch.direct import DirectPath
from abyssal.parallel.dispatch.dispatcher import ExpertParallelDispatcher
from abyssal.parallel.dispatch.exchange import Link
from abyssal.parallel.layout import RankLayout


def expert_parallel_dispatcher(
    config: ParallelConfig, layout: RankLayout, ep_group: dist.ProcessGroup, num_experts: int
) -> ExpertParallelDispatcher:
    """Return the dispatcher for all layers with `num_experts` experts, spread evenly over `ep_group`.

    Every rank of the run must call it, once and in the same order as other process groups are made.
    """
    return ExpertParallelDispatcher(DirectPath(Link.over(ep_group, layout.node_size), num_experts))
