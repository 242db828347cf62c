"""From a recipe to a model and its optimizer: everything that is applied to them, in one place and in this order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from abyssal.checkpoint.hf import ModelReader, load_into, read_model_directory
from abyssal.config import ModelConfig, RunConfig
from abyssal.errors import ConfigError, UsageError
from abyssal.model import Transformer, initialise
from abyssal.ops.kernels import choose_kernels
from abyssal.parallel.apply import parallelise
from abyssal.parallel.layout import RankLayout, lay_out
from abyssal.parallel.mesh import Mesh
from abyssal.ranks.placements import local_shard
from abyssal.ranks.ranks import ALONE, Ranks
from abyssal.train.optimizer import Optimizers, build_optimizer


@dataclass(frozen=True)
class BuiltRun:
    """What a rank steps: its part of the model and of the optimizer, and where it stands among the ranks."""

    layout: RankLayout
    model: Transformer
    optimizer: Optimizers


def build_run(config: RunConfig, device: torch.device, ranks: Ranks = ALONE, *, on_meta: bool = False) -> BuiltRun:
    """Build a run whose recipe is resolved; all ranks call this together.

    Args:
        config: the recipe.
        device: that the run computes on.
        ranks: that the run is laid over.
        on_meta: stop at shapes and types without memory, as a dry run does, also of layouts that are only planned.

    Raises:
        UsageError, ConfigError, ModelDirectoryError: see `lay_out_run` and `open_initial_weights`.
    """
    layout = lay_out_run(config, ranks.world_size, ranks.local_world_size, planned=on_meta)
    model = shape_model(config, device)
    model.to(torch.promote_types(model.compute_dtype, torch.float32))  # precision of the master weights
    mesh = Mesh.over(layout, device) if ranks.world_size > 1 else None
    if mesh is not None:
        parallelise(model, config.parallel, mesh)
    if not on_meta:
        model.to_empty(device=device)
        fill_weights(model, config)
    return BuiltRun(layout, model, build_optimizer(model, config.optimizer, mesh))


def lay_out_run(config: RunConfig, world_size: int, node_size: int, *, planned: bool = False) -> RankLayout:
    """Lay a run over `world_size` ranks, `node_size` on each node unless the recipe says.

    A layout that is only `planned` may be one that is not executed yet.

    Raises:
        UsageError: the run cannot be laid over so many ranks; names what could.
    """
    layout = lay_out(config.parallel, config.model, world_size, node_size)
    if layout.pp_size > 1 and not planned:
        raise UsageError(
            f"parallel.pp_size={layout.pp_size}: pipelines are planned (`abyssal plan`) and dry-run "
            "(`abyssal train --dry-run`), not executed yet; allowed here: 1"
        )
    if world_size > 1 and config.train.time_budget_s is not None:
        raise UsageError(
            f"train.time_budget_s={config.train.time_budget_s:g}: measures one process, but this run has "
            f"{world_size} ranks; give train.tokens, and remove the budget (unset)"
        )
    sizes, multiple = config.schedule.batch_size, config.train.batch_multiple
    constant = all(segment.to in (None, sizes.start) for segment in sizes.segments)
    divided = config.batch_size_at(0) if constant else multiple
    if divided % layout.dp_size:
        name = "schedule.batch_size: a step's sequences, " if constant else "train.batch_multiple="
        above = -(-divided // layout.dp_size) * layout.dp_size
        fewer = max(n for n in range(1, layout.dp_size) if divided % n == 0)
        raise UsageError(
            f"{name}{divided}: must be a multiple of the {layout.dp_size} ranks that share them; nearest: {above}, or "
            f"{fewer} ranks"
        )
    return layout


def shape_model(config: RunConfig, device: torch.device) -> Transformer:
    """Return the model that is to compute on `device`, on the meta device still: shapes without memory."""
    dtype: torch.dtype = getattr(torch, config.train.compute_dtype)
    with torch.device("meta"):
        return Transformer(config.model, choose_kernels(device, dtype, "train"), compute_dtype=dtype)


def fill_weights(model: Transformer, config: RunConfig) -> None:
    """Fill a model in place with the weights that the run begins with."""
    initialise(model, config.seed, local_shard)
    reader = open_initial_weights(config)
    if reader is not None:  # MTP modules that the directory lacks keep their initial weights
        load_into(model, reader, allow_missing_mtp=True)


def open_initial_weights(config: RunConfig) -> ModelReader | None:
    """Open the model directory that the run continues from, if it names one.

    Raises:
        ConfigError, ModelDirectoryError: no such directory, or the recipe's model has another shape.
    """
    if config.init_from is None:
        return None
    there, reader = read_model_directory(Path(config.init_from))
    free = {"max_position_embeddings", "rope_scaling", "initializer_range", "num_nextn_predict_layers"}
    written = (ModelConfig.from_hf(model.to_hf()) for model in (config.model, there))  # one spelling for both
    ours, theirs = (model.model_dump(exclude=free) for model in written)
    different = [f"{name}={ours[name]!r} (there {theirs[name]!r})" for name in ours if ours[name] != theirs[name]]
    if different:
        raise ConfigError(
            f"init_from={config.init_from!r}: the recipe's model has another shape: {', '.join(different)}"
        )
    return reader
