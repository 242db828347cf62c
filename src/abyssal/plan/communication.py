"""Bytes that devices send, by link class, and how long they take.

Links: `nvlink` inside a node, `network` between nodes. Bytes are those that one device sends; it receives as many.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from abyssal.config import ModelConfig
from abyssal.plan.calibration import Calibration
from abyssal.plan.hardware import Chip
from abyssal.plan.layout import Layout, Precision
from abyssal.plan.operations import GRADIENT_BYTES, OPERAND_BYTES, VALUE_BYTES

#: Bytes of a value that is dispatched: FP8 with an fp32 scale for 128 of them. Paper: §3.3.3.
DISPATCH_BYTES = {"fp8": 1 + 4 / 128, "bf16": 2.0}


@dataclass(frozen=True)
class LinkBytes:
    """Bytes by link class."""

    nvlink: float = 0.0
    network: float = 0.0

    def __add__(self, other: LinkBytes) -> LinkBytes:
        """Add link by link."""
        return LinkBytes(self.nvlink + other.nvlink, self.network + other.network)

    def __mul__(self, times: float) -> LinkBytes:
        """Scale both."""
        return LinkBytes(self.nvlink * times, self.network * times)

    def seconds(self, chip: Chip, efficiency: float = 1.0) -> float:
        """Return how long it takes, both links at once, at a share of their bandwidth."""
        times = []
        for size, bandwidth in ((self.nvlink, chip.nvlink_bandwidth), (self.network, chip.network_bandwidth)):
            if size and bandwidth is not None:
                times.append(size / (bandwidth * efficiency))
        return max(times, default=0.0)


def expected_destinations(model: ModelConfig, destinations: int) -> float:
    """Return over how many devices or nodes a token's experts are spread on average, if all are equally likely.

    A destination holds n_routed_experts / destinations consecutive experts. Groups are chosen first, then experts
    inside them, so a token meets at most `topk_group` of the destinations that hold whole groups. Paper: §2.1.2.
    """
    group = model.n_routed_experts // model.n_group
    here = model.n_routed_experts / destinations
    chosen, top = model.topk_group, model.num_experts_per_tok
    if here >= group:  # whole groups: how many of the chosen ones lie here, and whether an expert in them is taken
        groups = round(here / group)
        missed = 0.0
        for own in range(min(groups, chosen) + 1):
            choices = comb(groups, own) * comb(model.n_group - groups, chosen - own)
            missed += (
                choices / comb(model.n_group, chosen) * comb((chosen - own) * group, top) / comb(chosen * group, top)
            )
        return destinations * (1.0 - missed)
    taken = 1.0 - comb(chosen * group - round(here), top) / comb(chosen * group, top)
    return destinations * chosen / model.n_group * taken


def dispatch_bytes(model: ModelConfig, layout: Layout, chip: Chip, value_bytes: float) -> LinkBytes:
    """Return the bytes of sending a token to its experts, or back: once to each node, then on to each device there.

    Paper: §3.2.2: over the network first to the device of the same number, from there over NVLink.
    """
    if layout.ep_size == 1:
        return LinkBytes()
    nodes = max(1, -(-layout.ep_size // chip.node_size))
    size = model.hidden_size * value_bytes
    in_node = min(layout.ep_size, chip.node_size)
    devices = expected_destinations(model, layout.ep_size)
    # a copy that arrives in a node is at one of its devices, and goes no further if that is its destination
    nvlink = devices * (1 - 1 / in_node) * size
    if nodes == 1:
        return LinkBytes(nvlink=nvlink)
    return LinkBytes(nvlink=nvlink, network=expected_destinations(model, nodes) * (1 - 1 / nodes) * size)


@dataclass(frozen=True)
class LayerCommunication:
    """What one layer sends for one micro-batch in the forward pass, and again in the backward pass."""

    dispatch: LinkBytes = LinkBytes()
    combine: LinkBytes = LinkBytes()
    context: LinkBytes = LinkBytes()  # latents of the other devices' tokens
    tensor: LinkBytes = LinkBytes()  # hidden states around what tensor parallelism shares

    def hidden_s(self, chip: Chip, calibration: Calibration) -> float:
        """Return the seconds that the computation of another micro-batch can hide."""
        all_to_all = sum(t.seconds(chip, calibration.all_to_all) for t in (self.dispatch, self.combine))
        return all_to_all + self.context.seconds(chip)

    def exposed_s(self, chip: Chip) -> float:
        """Return the seconds for which the layer's own products wait."""
        return self.tensor.seconds(chip)

    @property
    def total(self) -> LinkBytes:
        """Everything."""
        return self.dispatch + self.combine + self.context + self.tensor


def layer_communication(
    model: ModelConfig, layout: Layout, chip: Chip, tokens: float, *, moe: bool
) -> LayerCommunication:
    """Return what a layer sends for `tokens` of a device: dispatch in the layout's precision, combine in bf16."""
    latents = tokens * (layout.cp_size - 1) * (model.kv_lora_rank + model.qk_rope_head_dim) * VALUE_BYTES
    inside = layout.cp_size * layout.tp_size <= chip.node_size
    context = LinkBytes(nvlink=latents) if inside else LinkBytes(network=latents)
    # gathered before a shared module and scattered after it; experts are whole, so in MoE layers attention alone
    tensor = LinkBytes(nvlink=2 * tokens * (layout.tp_size - 1) * model.hidden_size * VALUE_BYTES) * (
        1.0 if moe else 2.0
    )
    if not moe:
        return LayerCommunication(context=context, tensor=tensor)
    return LayerCommunication(
        dispatch=dispatch_bytes(model, layout, chip, DISPATCH_BYTES[layout.precision]) * tokens,
        combine=dispatch_bytes(model, layout, chip, VALUE_BYTES) * tokens,
        context=context,
        tensor=tensor,
    )


def stage_boundary_bytes(model: ModelConfig, layout: Layout, chip: Chip, tokens: float) -> LinkBytes:
    """Return what a stage sends to the next one for a micro-batch: hidden states in bf16."""
    size = tokens * model.hidden_size * VALUE_BYTES
    neighbours = layout.pp_size > 1
    inside = layout.pp_size * layout.tp_size * layout.cp_size * layout.ep_size <= chip.node_size
    return LinkBytes() if not neighbours else LinkBytes(nvlink=size) if inside else LinkBytes(network=size)


def reduction_bytes(parameters: float, ranks: int, apart: int, chip: Chip, precision: Precision) -> LinkBytes:
    """Return what ZeRO-1 sends at the end of a step: fp32 gradients scattered, weights gathered, over `ranks`.

    The ranks stand `apart` devices from one another. All bytes are charged to the slowest link that they need, as a
    flat ring would.
    """
    size = parameters * (ranks - 1) / ranks * (GRADIENT_BYTES + OPERAND_BYTES[precision])
    return LinkBytes(nvlink=size) if ranks * apart <= chip.node_size else LinkBytes(network=size)
