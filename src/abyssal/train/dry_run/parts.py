"""The distinct parts of a model, each built once as a rank of the run holds it, and what is read off their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from abyssal.config import ModelConfig, RunConfig
from abyssal.model import Transformer
from abyssal.model.feed_forward import Router, StackedExperts
from abyssal.model.layers import Linear
from abyssal.parallel.apply import policies
from abyssal.parallel.fake_ranks import fake_ranks
from abyssal.parallel.layout import RankLayout
from abyssal.ranks.launch import Launch
from abyssal.ranks.placements import copies, local
from abyssal.ranks.ranks import Ranks
from abyssal.train.build import build_run

EMBEDDING, DENSE, MOE, HEAD, MTP = "embedding", "dense block", "MoE block", "norm and head", "MTP module"
ONCE = (EMBEDDING, HEAD)  # a stage has no more than one
#: Axes of a parameter's mesh along which `fully_shard` gathers it.
GATHERED = ("edp", "dp_shard")


@dataclass(frozen=True)
class ParameterSizes:
    """What one rank holds of a parameter."""

    name: str
    shape: tuple[int, ...]  # of the whole
    local: tuple[int, ...]  # of this rank's part
    copies: int  # ranks of the stage that hold the same part
    gathered_from: int  # ranks, this one included, whose parts are gathered before use; 0: the run has one rank
    unit: str  # what is gathered at once: "root", "block", "router" or "experts"
    stored_bytes: int  # the master weights' memory: the part, padded to that of the first rank
    moment_bytes: int  # the optimizer's
    use_bytes: int  # of the weight as it is gathered, padding included; 0: it is used where it is stored
    gradient_bytes: int  # of its gradient before it is reduced, padding included
    cast_bytes: int  # of the copy in the compute dtype that a step makes of it; 0: it is used as it is

    @property
    def elements(self) -> int:
        """Of the whole."""
        return prod(self.shape)

    @property
    def local_elements(self) -> int:
        """Of this rank's part."""
        return prod(self.local)


@dataclass(frozen=True)
class ModelPart:
    """One distinct part of the model on one rank."""

    parameters: tuple[ParameterSizes, ...]
    buffer_elements: int = 0  # gate biases, whole on every rank
    buffer_bytes: int = 0

    def sum(self, field: str, unit: str | None = None) -> int:
        """Return the sum of a field of `ParameterSizes` over all parameters, or those of one unit."""
        return sum(getattr(sizes, field) for sizes in self.parameters if unit in (None, sizes.unit))

    @property
    def units(self) -> set[str]:
        """What is gathered apart."""
        return {sizes.unit for sizes in self.parameters}


def build_parts(config: RunConfig, layout: RankLayout, rank: int = 0) -> dict[str, ModelPart]:
    """Build each distinct part of the model once on the meta device, as `rank` of the layout, and read its tensors.

    The model is cut to one block of each kind, and then built as in a real run (`build_run`). Ranks of different stages
    with the same place in them hold the same of a part.
    """
    many = layout.world_size > 1
    with fake_ranks(layout.world_size, rank) if many else nullcontext():
        ranks = Ranks(dist.group.WORLD if many else None, launch=Launch(local_world_size=layout.node_size))
        short = config.model_copy(update={"model": one_block_of_each_kind(config.model)})
        run = build_run(short, torch.device("cpu"), ranks, on_meta=True)
        model, moments = run.model, run.optimizer.tensors(dict(run.model.named_parameters()))
        sizes: dict[str, list[ParameterSizes]] = {}
        buffers: dict[str, list[Tensor]] = {}
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(path, recurse=False):
                sizes.setdefault(part_of(name, short.model), []).append(_sizes(name, parameter, module, moments, model))
            for name, buffer in module.named_buffers(path, recurse=False):
                buffers.setdefault(part_of(name, short.model), []).append(buffer)
    return {
        part: ModelPart(
            tuple(parameters),
            sum(buffer.numel() for buffer in buffers.get(part, ())),
            sum(buffer.untyped_storage().nbytes() for buffer in buffers.get(part, ())),
        )
        for part, parameters in sizes.items()
    }


def one_block_of_each_kind(model: ModelConfig) -> ModelConfig:
    """Return the model with its distinct blocks only: a dense one, an MoE one and an MTP module, as far as it has them.

    Everything else of the shape stays, so a block is that of the whole model.
    """
    dense = min(1, model.first_k_dense_replace)
    moe = min(1, model.num_hidden_layers - model.first_k_dense_replace)
    return model.model_copy(
        update={
            "num_hidden_layers": dense + moe,
            "first_k_dense_replace": dense,
            "num_nextn_predict_layers": min(1, model.num_nextn_predict_layers),
        }
    )


def part_of(name: str, model: ModelConfig) -> str:
    """Return the part that a parameter of a model belongs to."""
    if name.startswith("model.embed_tokens."):
        return EMBEDDING
    if not name.startswith("model.layers."):
        return HEAD
    layer = int(name.split(".")[2])
    if layer >= model.num_hidden_layers:
        return MTP
    return MOE if model.is_moe(layer) else DENSE


def _sizes(
    name: str, parameter: nn.Parameter, module: nn.Module, moments: Mapping[str, Any], model: Transformer
) -> ParameterSizes:
    narrow, wide = policies(model.compute_dtype)
    own = local(parameter)
    unit = "block" if name.startswith("model.layers.") else "root"
    if isinstance(module, StackedExperts | Router):
        unit = "router" if isinstance(module, Router) else "experts"
    stored = _memory(own) // own.element_size()
    gathered_from, used_in, reduced_in = 0, parameter.dtype, parameter.dtype
    if isinstance(parameter, DTensor):
        gathered_from = _gathered_from(parameter)
        policy = wide if unit == "router" else narrow
        used_in, reduced_in = policy.param_dtype or parameter.dtype, policy.reduce_dtype or parameter.dtype
    in_use = stored * max(1, gathered_from)
    casts = isinstance(module, Linear | StackedExperts) and used_in != model.compute_dtype
    return ParameterSizes(
        name=name,
        shape=tuple(parameter.shape),
        local=tuple(own.shape),
        copies=copies(parameter),
        gathered_from=gathered_from,
        unit=unit,
        stored_bytes=_memory(own),
        moment_bytes=sum(_memory(local(moment)) for key, moment in moments[name].items() if key != "step"),
        use_bytes=in_use * used_in.itemsize if gathered_from else 0,
        gradient_bytes=in_use * reduced_in.itemsize,
        cast_bytes=in_use * model.compute_dtype.itemsize if casts else 0,
    )


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _gathered_from(parameter: DTensor) -> int:
    """Return how many ranks gather a parameter from one another."""
    mesh = parameter.device_mesh
    return prod(mesh.size(axis) for axis, name in enumerate(mesh.mesh_dim_names or ()) if name in GATHERED)
