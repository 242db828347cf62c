"""The operations of a device in one block: matrix products by shape, attention kernels, and passes over memory.

T tokens of the device, D hidden, F expert width, E experts. Everything is counted for one micro-batch and one device.
Paper: §3.3 for what is multiplied in FP8, what is kept, and what is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from abyssal.config import ModelConfig
from abyssal.plan.layout import Layout, Precision

Phase = Literal["forward", "input_gradient", "weight_gradient"]
#: Bytes of a value: activations and gradients between operations, and operands of a product by precision.
VALUE_BYTES, OPERAND_BYTES = 2, {"fp8": 1, "bf16": 2}
#: Bytes of a weight's gradient, which is accumulated in fp32.
GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Matmul:
    """`count` products [rows, depth] @ [depth, columns], each launched with the others at once."""

    name: str
    phase: Phase
    rows: float
    columns: float
    depth: float
    precision: Precision
    count: int = 1

    @property
    def flops(self) -> float:
        """Two operations a multiply-add."""
        return 2.0 * self.rows * self.columns * self.depth * self.count

    @property
    def bytes(self) -> float:
        """Operands read and result written; a weight's gradient is added to an fp32 accumulator."""
        operand = OPERAND_BYTES[self.precision]
        result = 2 * GRADIENT_BYTES if self.phase == "weight_gradient" else VALUE_BYTES
        operands = self.rows * self.depth + self.depth * self.columns
        return self.count * (operand * operands + result * self.rows * self.columns)


@dataclass(frozen=True)
class AttentionKernel:
    """Scores, softmax and weighted values of causal attention, in one kernel."""

    phase: Phase
    flops: float


@dataclass(frozen=True)
class MemoryPass:
    """Something that only moves memory: norms, rotation, casts, activation functions, permutations."""

    name: str
    phase: Phase
    bytes: float


Operation = Matmul | AttentionKernel | MemoryPass


@dataclass(frozen=True)
class DeviceWork:
    """The work of one device on a micro-batch."""

    model: ModelConfig
    layout: Layout
    sequence_length: int
    optimizer: str = "adamw"

    @property
    def tokens(self) -> float:
        """Tokens outside attention, T."""
        return self.layout.tokens_of_rank(self.sequence_length)

    @property
    def attention_tokens(self) -> float:
        """Tokens for which a device computes its share of the heads."""
        return self.tokens * self.layout.tp_size

    @property
    def experts(self) -> int:
        """Routed experts on the device."""
        return self.model.n_routed_experts // self.layout.ep_size


def attention_operations(work: DeviceWork) -> Iterator[Operation]:
    """Yield a layer's attention with the norms and the residual around it."""
    model, tokens, gathered = work.model, work.tokens, work.attention_tokens
    precision, tp = work.layout.precision, work.layout.tp_size
    hidden, latent, rope = model.hidden_size, model.kv_lora_rank, model.qk_rope_head_dim
    heads = model.num_attention_heads / tp
    queries, values = heads * model.qk_head_dim, heads * model.v_head_dim
    expanded = heads * (model.qk_nope_head_dim + model.v_head_dim)
    if model.q_lora_rank is None:
        yield from _linear("q_proj", gathered, hidden, queries, precision)
    else:
        yield from _linear("q_a_proj", tokens, hidden, model.q_lora_rank, precision)
        yield from _linear("q_b_proj", gathered, model.q_lora_rank, queries, precision)
    yield from _linear("kv_a_proj_with_mqa", tokens, hidden, latent + rope, precision)
    yield from _linear("kv_b_proj", gathered, latent, expanded, precision)
    yield from _linear("o_proj", gathered, values, hidden, precision)
    if work.layout.recompute == "published":  # the up-projections are computed again. Paper: §3.2.3
        if model.q_lora_rank is not None:
            yield Matmul("q_b_proj again", "input_gradient", gathered, queries, model.q_lora_rank, precision)
        yield Matmul("kv_b_proj again", "input_gradient", gathered, expanded, latent, precision)
    pairs = gathered * (work.sequence_length + 1) / 2 * heads  # of a query and a key it sees
    qk, v = model.qk_head_dim, model.v_head_dim
    yield AttentionKernel("forward", 2 * pairs * (qk + v))
    yield AttentionKernel("input_gradient", 2 * pairs * (3 * qk + 2 * v))  # scores again, then dV, dP, dQ, dK
    latents = (model.q_lora_rank or 0) + latent + rope
    moved = tokens * VALUE_BYTES * (4 * hidden + 2 * latents)  # input norm, residual, and the latents' norms
    moved += gathered * VALUE_BYTES * (2 * expanded + 2 * queries + values)  # keys put together, queries turned, cast
    yield from _passes("norms, rotation and casts", moved, precision)


def dense_operations(work: DeviceWork) -> Iterator[Operation]:
    """Yield a dense layer's FFN."""
    model, precision = work.model, work.layout.precision
    width = model.intermediate_size / work.layout.tp_size
    yield from _ffn("dense FFN", work.attention_tokens, model.hidden_size, width, precision)
    yield from _passes("norm and residual", work.tokens * VALUE_BYTES * 6 * model.hidden_size, precision)


def moe_operations(work: DeviceWork) -> Iterator[Operation]:
    """Yield an MoE layer's router, shared experts and the device's routed experts, evenly loaded."""
    model, tokens, precision = work.model, work.tokens, work.layout.precision
    rows = tokens * model.num_experts_per_tok  # that arrive at a device's experts
    yield from _linear("gate", tokens, model.hidden_size, model.n_routed_experts, "bf16")
    shared = model.n_shared_experts * model.moe_intermediate_size
    yield from _ffn("shared experts", tokens, model.hidden_size, shared, precision)
    yield from _ffn(
        "routed experts", rows / work.experts, model.hidden_size, model.moe_intermediate_size, precision, work.experts
    )
    moved = (
        tokens * VALUE_BYTES * 6 * model.hidden_size + tokens * 16 * model.n_routed_experts
    )  # scores in fp32, chosen
    moved += rows * model.hidden_size * (2 * OPERAND_BYTES[precision] + VALUE_BYTES)  # put in order, and added up
    yield from _passes("norm, routing and permutation", moved, precision)


def mtp_operations(work: DeviceWork) -> Iterator[Operation]:
    """Yield what an MTP module adds to its block: two norms and the projection of both halves."""
    hidden = work.model.hidden_size
    yield from _linear("eh_proj", work.tokens, 2 * hidden, hidden, "bf16")
    yield from _passes("two norms", work.tokens * VALUE_BYTES * 6 * hidden, "bf16")


def head_operations(work: DeviceWork) -> Iterator[Operation]:
    """Yield one use of the output head with its cross-entropy; in bf16. Paper: §3.3.1."""
    model, tp = work.model, work.layout.tp_size
    columns = model.vocab_size / tp
    yield from _linear("lm_head", work.attention_tokens, model.hidden_size, columns, "bf16")
    # logits in fp32: written, read for the maximum and the sum, and once more for the gradient
    yield MemoryPass("cross-entropy", "forward", work.attention_tokens * columns * 12)
    yield MemoryPass("cross-entropy", "input_gradient", work.attention_tokens * columns * 6)


def _linear(name: str, rows: float, inputs: float, outputs: float, precision: Precision) -> Iterator[Matmul]:
    """Yield a linear layer's three products."""
    yield Matmul(name, "forward", rows, outputs, inputs, precision)
    yield Matmul(name, "input_gradient", rows, inputs, outputs, precision)
    yield Matmul(name, "weight_gradient", outputs, inputs, rows, precision)


def _ffn(
    name: str, rows: float, hidden: float, width: float, precision: Precision, count: int = 1
) -> Iterator[Operation]:
    """Yield a SwiGLU FFN, or `count` of them at once: gate and up fused, then down; and the passes between."""
    for part, inputs, outputs in (("gate_up", hidden, 2 * width), ("down", width, hidden)):
        yield Matmul(f"{name}, {part}", "forward", rows, outputs, inputs, precision, count)
        yield Matmul(f"{name}, {part}", "input_gradient", rows, inputs, outputs, precision, count)
        yield Matmul(f"{name}, {part}", "weight_gradient", outputs, inputs, rows, precision, count)
    between = count * rows * width * (2 * VALUE_BYTES + OPERAND_BYTES[precision])
    yield MemoryPass(f"{name}, SwiGLU", "forward", between)
    # its output is computed again, its gradient is twice as wide, and casts follow. Paper: §3.2.3
    yield MemoryPass(f"{name}, SwiGLU", "input_gradient", 2.5 * between)
    if precision == "fp8":  # both operands of a weight's gradient are scaled anew along the tokens. Paper: §3.5.2
        yield MemoryPass(
            f"{name}, scaled along tokens", "weight_gradient", 3.0 * count * rows * (2 * hidden + 3 * width)
        )


def _passes(name: str, forward: float, precision: Precision) -> Iterator[MemoryPass]:
    """Yield passes over memory: the backward pass reads gradients beside values, and norms are computed again."""
    yield MemoryPass(name, "forward", forward)
    yield MemoryPass(name, "input_gradient", 2 * forward)
    if precision == "fp8":
        yield MemoryPass(f"{name}, scaled along tokens", "weight_gradient", 0.5 * forward)
