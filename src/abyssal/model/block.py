"""One transformer block in four steps, with a named state at each border between two of them.

    attend -> Attended -> dispatch -> Dispatched -> compute -> Computed -> combine -> Combined -> finish

`dispatch` and `combine` only start a transfer; the step after them waits for it. A pipeline runs the steps of one
micro-batch apart and puts those of another, forward or backward, between them.

Legend: T packed tokens, D hidden, K experts a token, M rows of the experts that live here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.model.attention import MultiHeadLatentAttention, NaiveCore
from abyssal.model.context import Context
from abyssal.model.feed_forward import DenseFFN, MixtureOfExperts
from abyssal.model.layers import RMSNorm
from abyssal.ops.kernels import Kernels


class Attended(NamedTuple):
    """Attention is done, and each token knows its experts."""

    residual: Tensor  # [T, D]
    hidden: Tensor  # [T, D] normed, what the feed-forward network reads
    routing: Any  # `Routing`; in a dense layer this and all that comes of it is None


class Dispatched(NamedTuple):
    """Rows are on their way to the experts."""

    residual: Tensor  # [T, D]
    hidden: Tensor  # [T, D]
    rows: Any  # `InFlight`


class Computed(NamedTuple):
    """All networks have run."""

    residual: Tensor  # [T, D]
    output: Tensor  # [T, D] of the dense network or the shared experts
    rows: Any  # [M, D] of the routed experts
    origin: Any  # how the rows find back to their tokens


class Combined(NamedTuple):
    """Rows are on their way back to their tokens."""

    residual: Tensor  # [T, D]
    output: Tensor  # [T, D]
    rows: Any  # `InFlight`


def tensors(state: Any) -> Iterator[Tensor]:
    """Yield every tensor of a state, those of tuples in it included, in the order of the fields."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple):
        for part in state:
            yield from tensors(part)


def map_tensors(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Return a state in which `function` has replaced every tensor, as `tensors` yields them; the rest is the same.

    To cut autograd at a border, go on with the state in which each floating tensor is a leaf of its own.
    """
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, tuple):
        make = getattr(state, "_make", type(state))  # of a NamedTuple, and of a tuple
        return make(map_tensors(function, part) for part in state)
    return state


class Block(nn.Module):
    """Attention and feed-forward, each on a normed input and added to the residual."""

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels) -> None:
        """Build layer number `layer`: dense below `first_k_dense_replace`, a mixture of experts from there on."""
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels.rms_norm)
        self.self_attn = MultiHeadLatentAttention(config, NaiveCore(config, kernels.attention), kernels.rms_norm)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels.rms_norm)
        self.mlp: DenseFFN | MixtureOfExperts
        if config.is_moe(layer):
            self.mlp = MixtureOfExperts(config, layer, kernels.experts)
        else:
            self.mlp = DenseFFN(config, config.intermediate_size)

    def attend(self, x: Tensor, ctx: Context) -> Attended:
        """Add attention to the residual; then choose where each token goes."""
        residual = x + self.self_attn(self.input_layernorm(x), ctx)
        hidden = self.post_attention_layernorm(residual)
        return Attended(residual, hidden, self.mlp.route(hidden, ctx))

    def dispatch(self, state: Attended) -> Dispatched:
        """Start to send rows to their experts."""
        return Dispatched(state.residual, state.hidden, self.mlp.dispatch(state.hidden, state.routing))

    def compute(self, state: Dispatched) -> Computed:
        """Wait for the rows and run the feed-forward networks."""
        return Computed(state.residual, *self.mlp.compute(state.hidden, state.rows))

    def combine(self, state: Computed) -> Combined:
        """Start to send the rows back."""
        return Combined(state.residual, state.output, self.mlp.combine(state.rows, state.origin))

    def finish(self, state: Combined) -> Tensor:
        """Wait for the rows and add everything to the residual: [T, D]."""
        return state.residual + self.mlp.finish(state.output, state.rows)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Map [T, D] to [T, D]."""
        return self.finish(self.combine(self.compute(self.dispatch(self.attend(x, ctx)))))
