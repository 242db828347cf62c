"""The process groups of a layout, as one device mesh and its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from abyssal.parallel.layout import AXES, RankLayout


@dataclass(frozen=True)
class Mesh:
    """A layout with its process groups; all are parts of one root mesh, as DTensors over several of them need."""

    layout: RankLayout
    stage: DeviceMesh  # all ranks of a pipeline stage
    dense: DeviceMesh  # what dense weights are sharded over: [dp_replicate,] edp and ep together
    expert_data: DeviceMesh  # what a slice of the experts is sharded over: [dp_replicate,] edp
    expert: DeviceMesh  # what experts are spread over: ep

    @classmethod
    def over(cls, layout: RankLayout, device: torch.device) -> Self:
        """Create the groups; called by all ranks of the default process group, as many as the layout has."""
        world = init_device_mesh(device.type, (layout.world_size,), mesh_dim_names=("world",))
        pp, dp_replicate, edp, ep = layout.sizes
        experts = world._unflatten(0, layout.sizes, AXES)
        dense = world._unflatten(0, (pp, dp_replicate, edp * ep), ("pp", "dp_replicate", "dp_shard"))
        if dp_replicate == 1:
            return cls(layout, dense["dp_shard"], dense["dp_shard"], experts["edp"], experts["ep"])
        stage = world._unflatten(0, (pp, layout.dp_size), ("pp", "dp"))["dp"]
        both = dense["dp_replicate", "dp_shard"]
        return cls(layout, stage, both, experts["dp_replicate", "edp"], experts["ep"])
