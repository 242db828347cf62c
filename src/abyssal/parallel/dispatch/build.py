"""From a recipe to the dispatcher of its experts."""

from __future__ import annotations

import torch.distributed as dist

from abyssal.config.parallel import ParallelConfig
from abyssal.parallel.dispatch.all_to_all import ExpertGroup
from abyssal.parallel.dispatch.direct import DirectPlanner
from abyssal.parallel.dispatch.dispatcher import ExpertParallelDispatcher
from abyssal.parallel.dispatch.node_limited import NodeLimitedPlanner
from abyssal.parallel.layout import RankLayout


def expert_parallel_dispatcher(
    config: ParallelConfig, layout: RankLayout, ep_group: dist.ProcessGroup, num_experts: int
) -> ExpertParallelDispatcher:
    """Return the dispatcher for all layers with `num_experts` experts, spread evenly over `ep_group`.

    Every rank of the run must call it, once and in the same order as other process groups are made. An expert group
    that fits into a node has no nodes to limit, and is sent to directly.
    """
    fp8 = config.dispatch_dtype == "fp8"
    group = ExpertGroup.of(ep_group, layout.node_size)
    if config.dispatch == "direct" or layout.ep_size <= layout.node_size:
        return ExpertParallelDispatcher(DirectPlanner(group, num_experts), fp8=fp8)
    internode, intranode = (
        ExpertGroup.of(dist.new_subgroups_by_enumeration(ranks, group_desc=name)[0], layout.node_size)
        for name, ranks in node_groups(layout).items()
    )
    return ExpertParallelDispatcher(NodeLimitedPlanner(group, internode, intranode, num_experts), fp8=fp8)


def node_groups(layout: RankLayout) -> dict[str, list[list[int]]]:
    """Return the ranks of each group that rows cross nodes in, one rank a node, and of each that they are forwarded in.

    An expert group fills whole nodes.
    """
    ep, node = layout.ep_size, layout.node_size
    groups = range(0, layout.world_size, ep)
    return {
        "experts_internode": [
            list(range(first + index, first + ep, node)) for first in groups for index in range(node)
        ],
        "experts_intranode": [list(range(first, first + node)) for first in range(0, layout.world_size, node)],
    }
