"""What a rank of a stage holds and sends in one step, from the parts of the stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Self

import torch

from abyssal.config import RunConfig
from abyssal.config.parallel import ParallelConfig
from abyssal.parallel.dispatch.volume import CommunicationVolume, expected_volume
from abyssal.parallel.layout import RankLayout
from abyssal.train.dry_run.parts import EMBEDDING, MOE, MTP, ModelPart, ParameterSizes
from abyssal.train.dry_run.stages import CutStage


@dataclass(frozen=True)
class BatchShare:
    """What one rank has of a step's batch."""

    sequences: int
    micro_batches: int
    length: int  # of a sequence, tokens


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by kind; all but the last are read off tensors."""

    weights: float = 0.0  # master weights, and the gates' biases
    moments: float = 0.0
    gradients: float = 0.0
    gathered: float = 0.0  # weights in use
    casts: float = 0.0  # their copies in the compute dtype, made once a step where no gathering casts
    activations: float = 0.0  # the plan's

    @property
    def total(self) -> float:
        """All kinds."""
        return float(sum(getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class StepCommunication:
    """What a rank sends in a step, bytes unless said otherwise; rings send what they must."""

    # rows to experts, and the gradients of what comes back
    dispatch: CommunicationVolume = field(default_factory=CommunicationVolume)
    # what comes back, and the gradients of the rows
    combine: CommunicationVolume = field(default_factory=CommunicationVolume)
    all_gather: float = 0.0
    reduce_scatter: float = 0.0
    all_reduce: float = 0.0  # between copies
    pipeline: float = 0.0  # hidden states to the next stage, gradients to the one before

    def __add__(self, other: Self) -> Self:
        """Add kind by kind."""
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Self:
        """Scale all."""
        return type(self)(*(getattr(self, f.name) * times for f in fields(self)))

    @property
    def bytes(self) -> float:
        """All kinds."""
        moved = self.dispatch.bytes + self.combine.bytes
        return moved + self.all_gather + self.reduce_scatter + self.all_reduce + self.pipeline


def memory_of(stage: CutStage, parts: Mapping[str, ModelPart], config: ParallelConfig, share: BatchShare) -> Memory:
    """Return what the first rank of a stage holds at the fullest moment of a step."""
    counted = [(parts[name], count) for name, count in stage.parts.items()]

    def every(field: str) -> int:
        return sum(part.sum(field) * count for part, count in counted)

    sharded = any(parameter.gathered_from for part, _ in counted for parameter in part.parameters)
    stored, gradients, gathered = every("stored_bytes"), every("gradient_bytes"), every("use_bytes")
    if sharded and (config.zero_stage > 1 or share.micro_batches == 1):  # each unit's is reduced at once, into shards
        largest = max(part.sum("gradient_bytes", unit) for part, _ in counted for unit in part.units)
        gradients = stored + largest
    if config.zero_stage == 3:  # one block at a time, beside what is the root's
        root = sum(part.sum("use_bytes", "root") * count for part, count in counted)
        gathered = root + max(part.sum("use_bytes") - part.sum("use_bytes", "root") for part, _ in counted)
    return Memory(
        weights=stored + sum(part.buffer_bytes * count for part, count in counted),
        moments=every("moment_bytes"),
        gradients=gradients,
        gathered=gathered,
        casts=every("cast_bytes"),
        activations=stage.activations,
    )


def communication_of(
    stage: CutStage,
    parts: Mapping[str, ModelPart],
    config: RunConfig,
    layout: RankLayout,
    share: BatchShare,
    *,
    number: int,
) -> StepCommunication:
    """Return what the first rank of stage `number` sends to other ranks in one step."""
    parallel, total = config.parallel, StepCommunication()
    for name, count in stage.parts.items():
        total += (
            sum((_of_weights(sizes, parallel, share) for sizes in parts[name].parameters), StepCommunication()) * count
        )
    if stage.shared:
        shared = parts[EMBEDDING].sum("gradient_bytes") / max(1, parts[EMBEDDING].parameters[0].gathered_from)
        total += StepCommunication(all_reduce=shared)  # once a step, between two stages
    hidden = config.model.hidden_size * _dtype(config).itemsize
    neighbours = (number > 0) + (number < layout.pp_size - 1)
    total += StepCommunication(pipeline=share.sequences * share.length * hidden * neighbours)
    return total + _of_experts(stage, config, layout, share, number * layout.dp_size)


def _of_weights(sizes: ParameterSizes, config: ParallelConfig, share: BatchShare) -> StepCommunication:
    """Return what gathering a parameter and reducing its gradient sends, round a ring."""
    others = sizes.gathered_from - 1
    if sizes.gathered_from == 0:
        return StepCommunication()
    reduced = share.micro_batches if config.zero_stage > 1 else 1
    gathered = 1
    if config.zero_stage == 3:  # the root's stays from the forward pass to the end of the backward pass
        gathered = share.micro_batches * (1 if sizes.unit == "root" else 2)
    shard = sizes.gradient_bytes / sizes.gathered_from
    return StepCommunication(
        all_gather=sizes.use_bytes / sizes.gathered_from * others * gathered,
        reduce_scatter=shard * others * reduced,
        all_reduce=2 * (sizes.copies - 1) / sizes.copies * shard * reduced,
    )


def _of_experts(
    stage: CutStage, config: RunConfig, layout: RankLayout, share: BatchShare, rank: int
) -> StepCommunication:
    token, micro_batch = expected_volume(config.parallel, layout, config.model, _dtype(config), rank)
    layers = stage.parts.get(MOE, 0)
    modules = stage.parts.get(MTP, 0)
    # MTP module k sees all but the last k positions of a sequence
    tokens = share.sequences * (layers * share.length + sum(share.length - k for k in range(1, modules + 1)))
    calls = share.micro_batches * (layers + modules)
    sent = {name: token[name] * tokens + micro_batch[name] * calls for name in token}
    return StepCommunication(
        dispatch=sent["dispatch"] + sent["combine_backward"], combine=sent["combine"] + sent["dispatch_backward"]
    )


def _dtype(config: RunConfig) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.train.compute_dtype)
    return dtype
