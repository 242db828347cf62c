"""The feed-forward half of a block: a dense SwiGLU network, or DeepSeekMoE. Paper: §2.1.2.

Both answer to the same four steps, each a function of a dict of tensors, so that a pipeline can cut a block at any
border and overlap one micro-batch's computation with another's communication:

| step | dense | mixture of experts |
|---|---|---|
| route | – | gate: adds `weights` [T, K] and `experts` [T, K] |
| dispatch | – | rows go to their experts: `rows` [M, D] and what it takes to bring them back |
| compute | `output` [T, D] | experts on `rows`, the shared expert's `output` [T, D] |
| combine | output | rows come back, summed onto output |

Legend: T packed tokens, D hidden, E routed experts, K experts a token, M = T * K rows, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.model.context import Context
from abyssal.model.layers import Linear
from abyssal.ops.balance_loss import balance_loss, inject_loss
from abyssal.ops.experts import CastExperts, Experts
from abyssal.ops.linear import WeightGradients
from abyssal.ops.permute import expert_order, from_experts, to_experts
from abyssal.ops.routing import affinities, choose_experts, gate_weights
from abyssal.ops.swiglu import swiglu

State = dict[str, Tensor]


class DenseFFN(nn.Module):
    """SwiGLU network: the feed-forward of the first layers, and the shared expert of the others."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        """Build the three projections."""
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, intermediate_size)
        self.up_proj = Linear(config.hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [T, D] to [T, D]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]

    def route(self, state: State, ctx: Context) -> State:
        """Nothing to choose."""
        return state

    def dispatch(self, state: State) -> State:
        """Nothing to send."""
        return state

    def compute(self, state: State) -> State:
        """Replace `hidden` by `output`."""
        return {"residual": state["residual"], "output": self(state["hidden"])}

    def combine(self, state: State) -> Tensor:
        """Return [T, D], to be added to the residual."""
        return state["output"]


class Gate(nn.Module):
    """The router's weights: a centroid and a load-balancing bias for each expert.

    The bias takes no gradient; after every step the trainer moves it against the load. Paper: §2.1.2 eq. 16.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        """Allocate [E, D] and the bias [E], which is fp32 in every precision."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.empty(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        """Follow `.to(device)` and `.to(dtype)`, but never below fp32: a rounded bias chooses other experts."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.e_score_correction_bias
        if moved.dtype.itemsize < 4:
            self.e_score_correction_bias = bias.to(moved.device)
        return self


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

    def forward(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Map rows [M, D], sorted by expert, to their weighted outputs [M, D]."""
        if self.prepared is not None:
            return self.prepared(rows, weights, counts)
        return self.kernel(rows, weights, counts, self.gate_up_proj, self.down_proj)


class Dispatcher(Protocol):
    """The seam between a router and its experts; expert parallelism puts its all-to-alls there."""

    def dispatch(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> State:
        """Bring tokens [T, D] to their experts [T, K]: `rows`, `row_weights`, `counts` and the way back."""
        ...

    def combine(self, state: State) -> Tensor:
        """Bring `rows` back and sum those of each token: [T, D]."""
        ...


class LocalDispatcher:
    """Brings rows to experts that all live here."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        """Serve `num_experts` experts, `top_k` a token."""
        self.num_experts, self.top_k = num_experts, top_k

    def dispatch(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> State:
        """Sort (token, choice) pairs by expert: `rows` [M, D], `row_weights` [M], `counts` [E] and the way back."""
        order, inverse, counts = expert_order(experts, self.num_experts)
        return {
            "rows": to_experts(hidden, order, inverse, self.top_k),  # [M, D]
            "row_weights": weights.flatten()[order],  # [M]
            "counts": counts,
            "order": order,
            "inverse": inverse,
        }

    def combine(self, state: State) -> Tensor:
        """Sum each token's rows: [M, D] -> [T, D]."""
        return from_experts(state["rows"], state["order"], state["inverse"], self.top_k)


class MixtureOfExperts(nn.Module):
    """DeepSeekMoE: shared experts for every token, and the K routed experts that a sigmoid gate chooses."""

    def __init__(self, config: ModelConfig, layer: int, kernel: Experts) -> None:
        """Build gate, routed and shared experts; `layer` is the key of its statistics."""
        super().__init__()
        self.config, self.layer = config, layer
        self.gate = Gate(config)
        self.experts = StackedExperts(config, kernel)
        self.shared_experts = DenseFFN(config, config.shared_intermediate_size)
        self.dispatcher: Dispatcher = LocalDispatcher(config.n_routed_experts, config.num_experts_per_tok)

    def route(self, state: State, ctx: Context) -> State:
        """Choose experts for `hidden` and weigh them; report the load; inject the balance loss."""
        cfg = self.config
        scores = affinities(state["hidden"], self.gate.weight)  # [T, E]  eq. 15
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
            load = torch.bincount(experts.flatten(), minlength=cfg.n_routed_experts)  # [E]
            ctx.statistics.expert_load[self.layer] = load
        weights = gate_weights(scores, experts, normalise=cfg.norm_topk_prob, scale=cfg.routed_scaling_factor)  # eq. 13
        return {**state, "weights": weights, "experts": experts}

    def dispatch(self, state: State) -> State:
        """Send each token's row to its experts."""
        sent = self.dispatcher.dispatch(state["hidden"], state["weights"], state["experts"])
        return {"residual": state["residual"], "hidden": state["hidden"], **sent}

    def compute(self, state: State) -> State:
        """Run the routed experts on `rows` and the shared ones on `hidden`."""
        rows = self.experts(state["rows"], state["row_weights"], state["counts"])
        output = self.shared_experts(state["hidden"])
        kept = {name: value for name, value in state.items() if name not in ("hidden", "row_weights")}
        return {**kept, "rows": rows, "output": output}

    def combine(self, state: State) -> Tensor:
        """Return [T, D]: shared plus routed, to be added to the residual."""
        return state["output"] + self.dispatcher.combine(state)  # eq. 12
