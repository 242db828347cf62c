"""The plan of serving: prefill and decode rates of a unit of devices, the expert-parallel bound, the most MTP can gain.

Paper: §3.4 for the units; arXiv 2505.09343, section 2.3.2, for the bound.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from abyssal.config import ModelConfig
from abyssal.plan.calibration import Calibration
from abyssal.plan.communication import DISPATCH_BYTES
from abyssal.plan.flops import decode_flops
from abyssal.plan.hardware import Chip, Cluster
from abyssal.plan.layout import Layout, Precision, divisors
from abyssal.plan.memory import cache_bytes_per_token
from abyssal.plan.operations import OPERAND_BYTES, VALUE_BYTES, DeviceWork
from abyssal.plan.parameters import count_parameters
from abyssal.plan.stage_costs import block_costs

#: The report's units: devices of a prefill and of a decode unit, and the tensor parallelism of their attention.
PREFILL_DEVICES, DECODE_DEVICES, ATTENTION_TP = 32, 320, 4
#: What tables show where nobody asks: requests a device, and tokens of context.
BATCHES, CONTEXT = (1, 8, 32, 64, 128, 256), 4096
ACCEPTANCES = (0.7, 0.85, 0.9)


@dataclass(frozen=True)
class DecodeStep:
    """One token for each of `batch` requests on each device of a unit; the parts are seconds."""

    batch: int
    memory_s: float  # weights and cache read
    arithmetic_s: float
    communication_s: float
    seconds: float

    @property
    def tokens_per_device_s(self) -> float:
        """Tokens that a device generates a second."""
        return self.batch / self.seconds


def expert_parallel_bound(
    bandwidth: float,
    *,
    hidden_size: int,
    layers: int,
    experts: int = 9,
    tokens: int = 32,
    dispatch_bytes: float = 1.0,
    combine_bytes: float = 2.0,
) -> float:
    """Return the least seconds an output token takes if nothing but dispatch and combine took time.

    Two micro-batches alternate, so each layer communicates twice for `tokens` of a device, and every one of a token's
    `experts` (the shared one among them) is reached over the same link.
    """
    seconds_per_exchange = (dispatch_bytes + combine_bytes) * tokens * experts * hidden_size / bandwidth
    return 2 * seconds_per_exchange * layers


def experts_touched(model: ModelConfig, tokens: float) -> float:
    """Return how many experts of a layer some of `tokens` use, in the mean, all being equally likely."""
    share = model.num_experts_per_tok / model.n_routed_experts
    return float(model.n_routed_experts * (1.0 - (1.0 - share) ** tokens))


def step_bytes(model: ModelConfig, tokens: float, weight_bytes: float = 1.0, cached: float = 0.0) -> float:
    """Return the bytes that a decoding pass over `tokens` reads: weights that any of them uses, and cached tokens."""
    count = count_parameters(model)
    moe_layers = model.num_hidden_layers - model.first_k_dense_replace
    fixed = count.activated_without_embedding - count.activated_main.routed_experts
    if model.tie_word_embeddings:  # the embedding is read as the head
        fixed += count.main.embedding
    routed = moe_layers * experts_touched(model, tokens) * _expert_parameters(model)
    return (fixed + routed) * weight_bytes + cached * cache_bytes_per_token(model)


def draft_bytes(model: ModelConfig, tokens: float, weight_bytes: float = 1.0) -> float:
    """Return the bytes that one pass over `tokens` of the first MTP module reads, the head again among them."""
    count = count_parameters(model)
    modules = model.num_nextn_predict_layers
    fixed = (count.activated_mtp.total - count.activated_mtp.routed_experts) / modules
    head = model.vocab_size * model.hidden_size
    return (fixed + head + experts_touched(model, tokens) * _expert_parameters(model)) * weight_bytes


def mtp_ceiling(
    model: ModelConfig, batch: int, acceptance: float, *, context: int = 0, weight_bytes: float = 1.0
) -> float:
    """Return how many times as fast drafting one token can make decoding at most, if reading bytes is all that counts.

    (1 + acceptance) over the bytes of a step on two tokens a request and its draft, against those of a plain step.
    """
    cached = batch * context
    plain = step_bytes(model, batch, weight_bytes, cached)
    return (
        (1.0 + acceptance)
        * plain
        / (step_bytes(model, 2 * batch, weight_bytes, cached) + draft_bytes(model, batch, weight_bytes))
    )


def decode_step(
    model: ModelConfig, chip: Chip, calibration: Calibration, *, devices: int, batch: int, context: int
) -> DecodeStep:
    """Return a decoding step of a unit: attention by data and tensor parallelism, experts over all its devices.

    Two micro-batches alternate, so a layer takes the longer of what it computes and what it communicates; the shared
    expert counts as one more routed one. Paper: §3.4.2.
    """
    count, layers = count_parameters(model), model.num_hidden_layers
    tp = math.gcd(math.gcd(ATTENTION_TP, devices), model.num_attention_heads)
    precision = "fp8" if chip.fp8_flops else "bf16"
    weight = OPERAND_BYTES[precision]
    attention = count.main.attention / tp
    chosen = model.num_experts_per_tok + model.n_shared_experts
    hosted = max(1.0, (model.n_routed_experts + model.n_shared_experts) / devices)
    moe_layers = layers - model.first_k_dense_replace
    touched = hosted * (1.0 - (1.0 - model.num_experts_per_tok / model.n_routed_experts) ** (batch * devices))
    weights = attention + count.main.dense_ffn + count.main.gate * 2 / weight
    weights += moe_layers * touched * _expert_parameters(model)
    head = model.vocab_size * model.hidden_size / tp * VALUE_BYTES
    cache = batch * context * cache_bytes_per_token(model)
    memory_s = (weights * weight + head + cache) / (chip.memory_bandwidth * calibration.memory_bandwidth)
    flops = decode_flops(model, context)
    linear = batch * (flops.total - flops.attention_scores - flops.head)
    peak = calibration.fp8_matmul_peak if chip.fp8_flops else calibration.bf16_matmul_peak
    arithmetic_s = linear / (chip.flops(precision) * (chip.matmul_peak or peak))
    arithmetic_s += batch * (flops.attention_scores + flops.head) / (chip.bf16_flops * calibration.attention_forward)
    bandwidth = (chip.network_bandwidth if devices > chip.node_size else chip.nvlink_bandwidth) or math.inf
    sent = batch * chosen * model.hidden_size * (DISPATCH_BYTES[precision] + VALUE_BYTES) * (1 - 1 / devices)
    communication_s = moe_layers * sent / (bandwidth * calibration.point_to_point)
    return DecodeStep(batch, memory_s, arithmetic_s, communication_s, max(memory_s, arithmetic_s, communication_s))


def compute_bound_batch(
    model: ModelConfig, chip: Chip, calibration: Calibration, *, devices: int, context: int, most: int = 65_536
) -> int | None:
    """Return the least batch a device at which a decoding step computes longer than it reads memory; none to `most`."""

    def computes(batch: int) -> bool:
        step = decode_step(model, chip, calibration, devices=devices, batch=batch, context=context)
        return step.arithmetic_s >= step.memory_s

    if not computes(most):
        return None
    low, high = 0, most  # computes(high); more requests only add arithmetic to weights that are read anyway
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if computes(middle) else (middle, high)
    return high


def prefill_rate(
    model: ModelConfig, cluster: Cluster, calibration: Calibration, *, devices: int, length: int, tokens: int = 16_384
) -> float:
    """Return the prompt tokens that a device of a prefill unit takes in a second, in batches of `tokens` a device.

    Attention by data parallelism over the unit, experts over all its devices; two micro-batches alternate, so a layer
    takes the longer of what it computes and what it communicates. Paper: §3.4.1.
    """
    chip = cluster.chip
    precision: Precision = "fp8" if chip.fp8_flops else "bf16"
    layout = Layout(ep_size=devices, micro_batch_size=max(1, tokens // length), precision=precision)
    work = DeviceWork(model, layout, length)
    blocks = block_costs(work, chip, calibration)
    moe_layers = model.num_hidden_layers - model.first_k_dense_replace
    moe, dense = blocks["moe"], blocks["dense"]
    seconds = (
        moe_layers * max(moe.paired.forward, moe.communication) + model.first_k_dense_replace * dense.alone.forward
    )
    return work.tokens / seconds


def unit_sizes(model: ModelConfig, cluster: Cluster) -> tuple[int, int]:
    """Return the devices of a prefill and of a decode unit: the report's where cluster and experts allow them."""
    sizes = [n for n in divisors(model.n_routed_experts) if n <= cluster.devices]
    prefill = max(n for n in sizes if n <= PREFILL_DEVICES)
    one_each = sizes[-1] == model.n_routed_experts and cluster.devices >= DECODE_DEVICES
    # an expert a device, and a quarter more devices for shared experts and copies of busy ones
    return prefill, DECODE_DEVICES if one_each and 5 * model.n_routed_experts == 4 * DECODE_DEVICES else sizes[-1]


def inference_facts(model: ModelConfig, cluster: Cluster, calibration: Calibration) -> dict[str, Any]:
    """Return what serving the model on units of the cluster's devices comes to."""
    chip, context = cluster.chip, min(CONTEXT, model.max_position_embeddings)
    prefill, decode = unit_sizes(model, cluster)
    steps = [decode_step(model, chip, calibration, devices=decode, batch=n, context=context) for n in BATCHES]
    bandwidth = (chip.network_bandwidth if decode > chip.node_size else chip.nvlink_bandwidth) if decode > 1 else None
    bound = None
    if bandwidth is not None:
        bound = expert_parallel_bound(
            bandwidth,
            hidden_size=model.hidden_size,
            layers=model.num_hidden_layers,
            experts=model.num_experts_per_tok + model.n_shared_experts,
        )
    return {
        "context": context,
        "prefill": {
            "devices": prefill,
            "tokens_per_device_s": prefill_rate(model, cluster, calibration, devices=prefill, length=context),
        },
        "decode": {
            "devices": decode,
            "steps": [asdict(step) | {"tokens_per_device_s": step.tokens_per_device_s} for step in steps],
            "compute_bound_batch": compute_bound_batch(model, chip, calibration, devices=decode, context=context),
            "expert_parallel_bound_s": bound,
        },
        "cache_bytes_per_token": cache_bytes_per_token(model),
        "mtp_ceiling": [
            {"batch": batch, "acceptance": rate, "times": mtp_ceiling(model, batch, rate, context=context)}
            for batch in BATCHES
            for rate in ACCEPTANCES
        ]
        if model.num_nextn_predict_layers
        else [],
    }


def _expert_parameters(model: ModelConfig) -> int:
    """Return the parameters of one routed expert."""
    return 3 * model.hidden_size * model.moe_intermediate_size
