"""Multi-token prediction: modules that go on from the main model's output. Paper: §2.2.

Legend: T packed tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.model.block import Block
from abyssal.model.context import Context
from abyssal.model.layers import Linear, RMSNorm
from abyssal.ops.kernels import Kernels


def next_tokens(tokens: Tensor, depth: int) -> list[Tensor]:
    """Return for k = 1 .. depth the ids k places further on in the pack, [T] each; the last k are the first again.

    Of each sequence's last k places, which are followed by no such token, MTP reads nothing.
    """
    return [tokens.roll(-k) for k in range(1, depth + 1)]


class SharedHead(nn.Module):
    """The MTP module's own final norm; the output head behind it is the main model's."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        """Build the norm."""
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels.rms_norm)


class MTPBlock(Block):
    """One MTP module: joins the hidden state with the next token's embedding and runs a block of its own.

    Module k is layer `num_hidden_layers + k - 1`, as released; its block's names are those of any other layer.

    Differs: the report draws the hidden state first in the concatenation; the released weights take the embedding
    first, and so do we. The incoming hidden state is the one after the final norm, as all engines feed it.
    """

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels) -> None:
        """Build the block, and the two norms and the projection before it."""
        super().__init__(config, layer, kernels)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels.rms_norm)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels.rms_norm)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config, kernels)

    def predict(self, h: Tensor, next_embedding: Tensor, ctx: Context) -> Tensor:
        """Return the hidden states that the output head reads, and that the next module starts from.

        Args:
            h: [T, D], normed output of the main model or of the module before.
            next_embedding: [T, D], the embedding of the token k places further on.

        Returns:
            [T, D], after shared_head.norm.
        """
        joined = torch.cat((self.enorm(next_embedding), self.hnorm(h)), -1)  # [T, 2D]
        h = self.eh_proj(joined)  # [T, D]  eq. 21
        h = self.forward(h, ctx)  # eq. 22; not by a call, so that this method is the module's one entrance
        return self.shared_head.norm(h)  # type: ignore[no-any-return]  # eq. 23, up to the shared output head
