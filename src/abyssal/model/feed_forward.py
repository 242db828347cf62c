"""The feed-forward half of a block: a dense SwiGLU network, or DeepSeekMoE. Paper: §2.1.2.

Both have the steps of `model.block`; in a dense network all but `compute` do nothing.

Legend: T packed tokens, D hidden, E routed experts, K experts a token, M = T * K rows, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.model.context import Context
from abyssal.model.dispatcher import Dispatcher, InFlight, LocalDispatcher
from abyssal.model.layers import Linear
from abyssal.ops.balance_loss import balance_loss, inject_loss
from abyssal.ops.experts import CastExperts, Experts
from abyssal.ops.linear import WeightGradients
from abyssal.ops.permute import count_experts
from abyssal.ops.routing import affinities, choose_experts, routing_weights
from abyssal.ops.swiglu import swiglu
from abyssal.ops.version import Version


class Routing(NamedTuple):
    """Where each token goes."""

    weights: Tensor  # [T, K] in at least fp32
    experts: Tensor  # [T, K] indices


class DenseFFN(nn.Module):
    """SwiGLU network: the feed-forward of the first layers, and the shared expert of the others."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        """Build the three projections."""
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, intermediate_size)
        self.up_proj = Linear(config.hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, config.hidden_size)
        self.gate_up: Callable[[Tensor], Tensor] | None = None  # both in one product, prepared for inference

    def prepare_for_good(self, version: Version, dtype: torch.dtype) -> None:
        """Let `version` lay out gate above up as one weight, for inference; what is stored is let go."""
        gate, up = self.gate_proj, self.up_proj
        self.gate_up = version.with_weight(torch.cat((gate.weight, up.weight)), dtype)
        gate.weight = up.weight = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Map [T, D] to [T, D]."""
        gate, up = (self.gate_proj(x), self.up_proj(x)) if self.gate_up is None else self.gate_up(x).chunk(2, -1)
        return self.down_proj(swiglu(gate, up))  # type: ignore[no-any-return]

    def route(self, hidden: Tensor, ctx: Context) -> None:
        """Nothing to choose."""

    def dispatch(self, hidden: Tensor, routing: None) -> None:
        """Nothing to send."""

    def compute(self, hidden: Tensor, rows: None) -> tuple[Tensor, None, None]:
        """Run the network."""
        return self(hidden), None, None

    def combine(self, rows: None, origin: None) -> None:
        """Nothing to send back."""

    def finish(self, output: Tensor, rows: None) -> Tensor:
        """Return the output."""
        return output


class Router(nn.Module):
    """What experts are chosen by: a centroid and a load-balancing bias for each expert.

    The bias takes no gradient; after every step the trainer moves it against the load. Paper: §2.1.2 eq. 16.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        """Allocate [E, D] and the bias [E], which is fp32 in every precision."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.empty(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Follow `.to(device)` and `.to(dtype)`, but never below fp32: a rounded bias chooses other experts."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.e_score_correction_bias
        if moved.dtype.itemsize < 4:
            self.e_score_correction_bias = bias.to(moved.device)
        return self

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the affinities of tokens [T, D] to the experts: [T, E] in at least fp32."""
        return affinities(hidden, self.weight)  # eq. 15


class StackedExperts(nn.Module):
    """All experts of a layer, stacked; expert parallelism splits dim 0 and changes nothing else."""

    def __init__(self, config: ModelConfig, kernel: Experts) -> None:
        """Allocate gate_up_proj [E, 2F, D] and down_proj [E, D, F]."""
        super().__init__()
        e, d, f = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, f))
        self.kernel = kernel
        self.prepared: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # as in `Linear`

    def prepare(self, dtype: torch.dtype, deferred: WeightGradients | None = None) -> None:
        """Cast both stacks for all products until `prepared` is dropped; `deferred` takes their gradients' products."""
        self.prepared = CastExperts(self.kernel, self.gate_up_proj, self.down_proj, dtype, deferred)

    def prepare_for_good(self, version: Version, dtype: torch.dtype) -> None:
        """Let `version` lay both stacks out as it reads them, for inference; what is stored is let go."""
        kernel = version.function
        gate_up, down = (version.prepare(stack, dtype) for stack in (self.gate_up_proj, self.down_proj))
        self.prepared = lambda rows, weights, counts: kernel(rows, weights, counts, gate_up, down)
        self.gate_up_proj = self.down_proj = None  # type: ignore[assignment]

    def forward(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Map rows [M, D], sorted by expert, to their weighted outputs [M, D]."""
        if self.prepared is not None:
            return self.prepared(rows, weights, counts)
        return self.kernel(rows, weights, counts, self.gate_up_proj, self.down_proj)


class MixtureOfExperts(nn.Module):
    """DeepSeekMoE: shared experts for every token, and the K routed experts that the router chooses."""

    def __init__(self, config: ModelConfig, layer: int, kernel: Experts) -> None:
        """Build router, routed and shared experts; `layer` is the key of its statistics."""
        super().__init__()
        self.config, self.layer = config, layer
        self.gate = Router(config)
        self.experts = StackedExperts(config, kernel)
        self.shared_experts = DenseFFN(config, config.shared_intermediate_size)
        self.dispatcher: Dispatcher = LocalDispatcher(config.n_routed_experts, config.num_experts_per_tok)

    def route(self, hidden: Tensor, ctx: Context) -> Routing:
        """Choose experts for `hidden` [T, D] and weigh them; report the load; inject the balance loss."""
        cfg = self.config
        scores = self.gate(hidden)  # [T, E]  eq. 15
        experts = choose_experts(
            scores,
            self.gate.e_score_correction_bias,
            n_group=cfg.n_group,
            topk_group=cfg.topk_group,
            top_k=cfg.num_experts_per_tok,
        )  # [T, K]  eq. 16
        if ctx.balance_weight:
            lengths = ctx.balance_lengths or ctx.lengths
            losses = balance_loss(scores, lengths, cfg.num_experts_per_tok)  # [sequences]  eq. 17
            scores = inject_loss(scores, ctx.balance_weight * losses.sum())
            if ctx.statistics is not None:
                ctx.statistics.balance_loss[self.layer] = losses.detach().mean()
        if ctx.statistics is not None:
            ctx.statistics.expert_load[self.layer] = count_experts(experts, cfg.n_routed_experts)  # [E]
        weights = routing_weights(
            scores, experts, normalise=cfg.norm_topk_prob, scale=cfg.routed_scaling_factor
        )  # eq. 13
        return Routing(weights, experts)

    def dispatch(self, hidden: Tensor, routing: Routing) -> InFlight:
        """Start to send each token's row to its experts."""
        return self.dispatcher.start_dispatch(hidden, *routing)

    def compute(self, hidden: Tensor, rows: InFlight) -> tuple[Tensor, Tensor, Any]:
        """Run the routed experts on their rows and the shared ones on `hidden`: shared [T, D], routed [M, D]."""
        received = self.dispatcher.finish_dispatch(rows)
        routed = self.experts(received.rows, received.row_weights, received.counts)
        return self.shared_experts(hidden), routed, received.origin

    def combine(self, rows: Tensor, origin: Any) -> InFlight:
        """Start to send the experts' rows back."""
        return self.dispatcher.start_combine(rows, origin)

    def finish(self, output: Tensor, rows: InFlight) -> Tensor:
        """Return shared plus routed: [T, D]."""
        return output + self.dispatcher.finish_combine(rows)  # eq. 12
