"""One transformer block in four steps.

Legend: T packed tokens, D hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.model.attention import MultiHeadLatentAttention, NaiveCore
from abyssal.model.context import Context
from abyssal.model.feed_forward import DenseFFN, MixtureOfExperts, State
from abyssal.model.layers import RMSNorm
from abyssal.ops.kernels import Kernels


class Block(nn.Module):
    """Attention and feed-forward, each on a normed input and added to the residual.

    `forward` is the composition of `attend`, `dispatch`, `compute` and `combine`, nothing else: whoever runs the four
    apart, with autograd cut between them, gets the same values and gradients.
    """

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

    def attend(self, x: Tensor, ctx: Context) -> State:
        """Attention onto the residual; then choose where each token goes."""
        residual = x + self.self_attn(self.input_layernorm(x), ctx)
        return self.mlp.route({"residual": residual, "hidden": self.post_attention_layernorm(residual)}, ctx)

    def dispatch(self, state: State) -> State:
        """Send rows to their experts."""
        return self.mlp.dispatch(state)

    def compute(self, state: State) -> State:
        """Run the feed-forward networks."""
        return self.mlp.compute(state)

    def combine(self, state: State) -> Tensor:
        """Bring the rows back and add everything to the residual: [T, D]."""
        return state["residual"] + self.mlp.combine(state)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Map [T, D] to [T, D]."""
        return self.combine(self.compute(self.dispatch(self.attend(x, ctx))))
