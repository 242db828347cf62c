"""A model spread over ranks as DTensors, in the layouts that a run may have."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from abyssal.model import Transformer
from abyssal.model.feed_forward import MixtureOfExperts

#: dp_replicate, edp and ep, of one rank and of four.
ONE = (1, 1, 1)
LAYOUTS = {
    "dp 4": (1, 4, 1),
    "edp 2 x ep 2": (1, 2, 2),
    "ep 4": (1, 1, 4),
    "dp_replicate 2 x edp 2": (2, 2, 1),
    "dp_replicate 2 x ep 2": (2, 1, 2),
}

#: Over four ranks rows end in shards that are shorter (97, 33) or empty (9 and 6); experts need dims that divide.
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 20,
    "intermediate_size": 33,
    "moe_intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 3,
    "q_lora_rank": 9,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def spread(model: Transformer, layout: tuple[int, int, int]) -> Transformer:
    """Shard the parameters of a model in place: dense ones by rows over edp and ep, experts over ep and edp.

    What the parameters hold is kept. Nothing happens to a model on one rank. The process group is made if there is
    none yet.
    """
    if layout == ONE:
        return model
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    replicate, edp, ep = layout
    mesh = init_device_mesh("cpu", layout, mesh_dim_names=("dp_replicate", "edp", "ep"))
    dense = init_device_mesh("cpu", (replicate, edp * ep), mesh_dim_names=("dp_replicate", "dp_shard"))
    for module in list(model.modules()):
        if isinstance(module, MixtureOfExperts):
            _spread_experts(module.experts, mesh, layout)
    fully_shard(model, mesh=dense["dp_shard"] if replicate == 1 else dense)
    return model


def _spread_experts(experts: torch.nn.Module, mesh: DeviceMesh, layout: tuple[int, int, int]) -> None:
    ep = mesh["ep"]
    for name, whole in list(experts.named_parameters()):
        local = whole.detach().chunk(ep.size())[ep.get_local_rank()].clone()
        experts.register_parameter(name, torch.nn.Parameter(DTensor.from_local(local, ep, [Shard(0)])))
    sharded = mesh["edp"] if layout[0] == 1 else mesh["dp_replicate", "edp"]
    fully_shard(experts, mesh=sharded, shard_placement_fn=lambda parameter: Shard(1))
