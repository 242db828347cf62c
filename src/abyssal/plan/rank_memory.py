"""What the memory of a device holds in training, by kind, in bytes. Paper: §3.1, ZeRO-1; §3.2.3, §3.3.3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

from abyssal.config import ModelConfig
from abyssal.plan.communication import DISPATCH_BYTES
from abyssal.plan.hardware import Cluster
from abyssal.plan.layout import BLOCK_KINDS, Layout, Precision, StageBlocks
from abyssal.plan.operations import GRADIENT_BYTES, OPERAND_BYTES, VALUE_BYTES, DeviceWork
from abyssal.plan.parameters import ParametersByPart, count_parameters
from abyssal.plan.schedules import SCHEDULES, PipelineSchedule, peak_activations
from abyssal.plan.trainer_memory import trainer_activation_bytes

MASTER_BYTES, MOMENT_BYTES = 4, 4  # fp32 weights; AdamW's two moments in bf16. Paper: §3.3.3
#: The input of o_proj, which attention's backward pass reads too, in 12 bits. Paper: §3.3.3.
ATTENTION_OUTPUT = {"fp8": 1.5, "bf16": 2.0}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one device by kind."""

    parameters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    buffers: float = 0.0

    def __add__(self, other: Self) -> Self:
        """Add kind by kind."""
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> float:
        """All kinds."""
        return float(sum(getattr(self, f.name) for f in fields(self)))

    @property
    def largest(self) -> str:
        """The kind that takes most."""
        return max((f.name for f in fields(self)), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class RankParameters:
    """Parameters on one device: those of routed experts, of other FP8 matrices, and those that stay in bf16."""

    experts: float = 0.0
    dense: float = 0.0
    unquantized: float = 0.0  # embedding, head, router, norms, eh_proj

    def __add__(self, other: RankParameters) -> RankParameters:
        """Add kind by kind."""
        unquantized = self.unquantized + other.unquantized
        return RankParameters(self.experts + other.experts, self.dense + other.dense, unquantized)

    @property
    def total(self) -> float:
        """All of them."""
        return self.experts + self.dense + self.unquantized

    def bytes(self, precision: Precision) -> float:
        """Return the bytes of the weights that are multiplied with."""
        return (self.experts + self.dense) * OPERAND_BYTES[precision] + self.unquantized * VALUE_BYTES


def stage_parameters(
    model: ModelConfig, layout: Layout, stage: StageBlocks, *, embedding_beside: bool
) -> RankParameters:
    """Return the parameters of a stage on one device.

    `embedding_beside`: the rank holds the embedding anyway, so its MTP modules need no copy of it. Paper: §3.2.3.
    """
    count = count_parameters(model)
    tables = count.main.embedding
    layers = model.num_hidden_layers
    moe_layers = max(1, layers - model.first_k_dense_replace)
    per_layer = ParametersByPart(attention=count.main.attention // layers, norms=2 * model.hidden_size)
    per_moe_layer = ParametersByPart(
        routed_experts=count.main.routed_experts // moe_layers,
        shared_experts=count.main.shared_experts // moe_layers,
        gate=count.main.gate // moe_layers,
    )
    ffn = 3 * model.hidden_size * model.intermediate_size
    parts = (
        per_layer * stage.layers
        + per_moe_layer * (stage.moe + stage.mtp)
        + ParametersByPart(dense_ffn=ffn * stage.dense)
    )
    unquantized = parts.norms + parts.gate + stage.mtp * 2 * model.hidden_size**2
    copies = stage.embedding + bool(stage.heads) + bool(stage.mtp and not embedding_beside)
    if model.tie_word_embeddings and stage.embedding and stage.heads:
        copies -= 1
    return RankParameters(
        experts=parts.routed_experts / layout.ep_size,
        dense=(parts.attention + parts.dense_ffn) / layout.tp_size + parts.shared_experts,
        unquantized=unquantized + copies * tables / layout.tp_size,
    )


def block_activation_bytes(work: DeviceWork, kind: str) -> float:
    """Return the bytes that one block of a kind keeps of a micro-batch for its backward pass.

    Inputs of products in the layout's precision; as published, norms, up-projections and SwiGLU's output are not kept
    but computed again. Paper: §3.2.3, §3.3.3.
    """
    model, layout = work.model, work.layout
    hidden, operand = model.hidden_size, OPERAND_BYTES[layout.precision]
    if kind == "heads":
        return work.tokens * hidden * VALUE_BYTES
    if layout.recompute == "full":
        return work.tokens * hidden * VALUE_BYTES * (2 if kind == "mtp" else 1)
    again = layout.recompute == "none"
    heads = model.num_attention_heads / layout.tp_size
    latents = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim
    kept = work.tokens * (
        2 * hidden * (VALUE_BYTES + operand) + latents * VALUE_BYTES
    )  # both norms' inputs and outputs
    kept += work.attention_tokens * heads * (model.v_head_dim * ATTENTION_OUTPUT[layout.precision] + 4)
    if again:  # queries, keys and values
        kept += work.attention_tokens * heads * (2 * model.qk_head_dim + model.v_head_dim) * VALUE_BYTES
        kept += work.tokens * (2 * hidden + latents) * VALUE_BYTES  # the norms' outputs before their cast
    width = (2 + again) * operand  # gate and up; SwiGLU's output
    if kind == "dense":
        return kept + work.attention_tokens * model.intermediate_size / layout.tp_size * width
    rows = work.tokens * model.num_experts_per_tok
    kept += rows * (hidden * operand + model.moe_intermediate_size * width + 8)  # and weight and place of each row
    kept += work.tokens * model.n_shared_experts * model.moe_intermediate_size * width
    kept += work.tokens * model.n_routed_experts * 4  # affinities in fp32
    return kept + (work.tokens * 2 * hidden * (VALUE_BYTES + operand) if kind == "mtp" else 0.0)


def stage_activation_bytes(work: DeviceWork, stage: StageBlocks) -> float:
    """Return the bytes that a stage keeps of a micro-batch for its backward pass."""
    kept = trainer_activation_bytes if work.layout.state == "trainer" else block_activation_bytes
    return float(sum(kept(work, kind) * getattr(stage, kind) for kind in BLOCK_KINDS if getattr(stage, kind)))


def rank_memory(
    work: DeviceWork, cluster: Cluster, stages: tuple[StageBlocks, ...], schedule: PipelineSchedule
) -> tuple[RankMemory, ...]:
    """Return the memory of a device of each pipeline rank."""
    layout = work.layout
    kept = [stage_activation_bytes(work, stage) for stage in stages]
    return tuple(
        state_memory(work, cluster, [stages[n] for n in layout.stages_of_ranks[rank]])
        + RankMemory(
            activations=peak_activations(schedule, rank, size=dict(enumerate(kept))),
            buffers=_buffers(work, [stages[n] for n in layout.stages_of_ranks[rank]]),
        )
        for rank in range(layout.pp_size)
    )


def state_memory(work: DeviceWork, cluster: Cluster, stages: list[StageBlocks]) -> RankMemory:
    """Return what a device that holds `stages` keeps from step to step: weights, gradients, ZeRO-1's share.

    Abyssal's trainer keeps fp32 weights and moments whole on each device, and casts weights when they are used; the
    casts live until the backward pass.
    """
    layout = work.layout
    held = rank_parameters(work.model, layout, stages)
    if layout.state == "trainer":
        return RankMemory(
            parameters=held.total * MASTER_BYTES,
            gradients=held.total * GRADIENT_BYTES,
            optimizer=_moments(work, held) * 2 * MASTER_BYTES,
            buffers=(held.experts + held.dense) * VALUE_BYTES,
        )
    dense_ranks, expert_ranks = replicas(layout, cluster)
    sharded = (held.dense + held.unquantized) / dense_ranks + held.experts / expert_ranks
    return RankMemory(
        parameters=held.bytes(layout.precision),
        gradients=held.total * GRADIENT_BYTES,
        optimizer=sharded * MASTER_BYTES + _moments(work, held, dense_ranks, expert_ranks) * MOMENT_BYTES,
    )


def _moments(work: DeviceWork, held: RankParameters, dense_ranks: int = 1, expert_ranks: int = 1) -> float:
    """Return the parameters with two moments on a device; Muon's one momentum of a hidden matrix counts half."""
    hidden = 0.5 if work.optimizer == "muon" else 1.0
    return (hidden * held.dense + held.unquantized) / dense_ranks + hidden * held.experts / expert_ranks


def rank_parameters(model: ModelConfig, layout: Layout, stages: list[StageBlocks]) -> RankParameters:
    """Return the parameters of a device that holds `stages`."""
    beside = any(stage.embedding for stage in stages)
    return sum((stage_parameters(model, layout, stage, embedding_beside=beside) for stage in stages), RankParameters())


def replicas(layout: Layout, cluster: Cluster) -> tuple[int, int]:
    """Return how many devices hold the same attention weights, and the same experts; DualPipe holds both twice."""
    copies = 2 if layout.schedule == "dualpipe" and layout.pp_size > 1 else 1
    stage = cluster.devices // layout.pp_size
    return copies * stage // layout.tp_size, copies * max(1, stage // layout.ep_size)


def estimate_memory(work: DeviceWork, cluster: Cluster, stages: tuple[StageBlocks, ...]) -> tuple[RankMemory, ...]:
    """Return `rank_memory` with the closed form of the schedule's activations in place of its table."""
    layout = work.layout
    chunks = SCHEDULES[layout.schedule].activations(layout.pp_size, layout.num_stages)
    return tuple(
        state_memory(work, cluster, held)
        + RankMemory(
            activations=chunks * sum(stage_activation_bytes(work, stage) for stage in held) / len(held),
            buffers=_buffers(work, held),
        )
        for held in ([stages[n] for n in numbers] for numbers in layout.stages_of_ranks)
    )


@dataclass(frozen=True)
class MemoryFault:
    """A pipeline rank whose devices need more than there is."""

    layout: Layout
    rank: int
    need: RankMemory
    limit: float

    @property
    def excess(self) -> float:
        """Bytes beyond the limit."""
        return self.need.total - self.limit

    def __str__(self) -> str:
        """Say how much is needed, how much there is, and what takes most."""
        largest = self.need.largest
        return (
            f"a device of pipeline rank {self.rank} needs {self.need.total / 1e9:.1f} GB of {self.limit / 1e9:.1f} GB, "
            f"{self.excess / 1e9:.1f} GB too many; most are {largest}, {getattr(self.need, largest) / 1e9:.1f} GB"
        )


def memory_fault(layout: Layout, memory: Sequence[RankMemory], limit: float) -> MemoryFault | None:
    """Return the fault of the fullest rank, or none where all fit into `limit` bytes."""
    rank = max(range(len(memory)), key=lambda n: memory[n].total)
    return MemoryFault(layout, rank, memory[rank], limit) if memory[rank].total > limit else None


def _buffers(work: DeviceWork, stages: list[StageBlocks]) -> float:
    """Return the temporary buffers: rows sent to experts and back, for both passes of a pair, and logits."""
    model, layout = work.model, work.layout
    if layout.state == "trainer":  # its casts count with the state; other temporary buffers are small
        return 0.0
    rows = work.tokens * model.num_experts_per_tok
    moving = 0.0
    if layout.ep_size > 1 and any(stage.moe or stage.mtp for stage in stages):
        moving = 2 * rows * model.hidden_size * (DISPATCH_BYTES[layout.precision] + VALUE_BYTES)
    working = 4 * rows * model.moe_intermediate_size * VALUE_BYTES
    logits = 0.0
    if any(stage.heads for stage in stages):  # in fp32, and their gradient in bf16
        logits = work.attention_tokens * model.vocab_size / layout.tp_size * (4 + VALUE_BYTES)
    return moving + working + logits
