"""The whole network: embedding, blocks, final norm, output head, MTP modules.

Legend: T packed tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from abyssal.config import ModelConfig
from abyssal.model.block import Block
from abyssal.model.context import Context
from abyssal.model.layers import Linear, RMSNorm
from abyssal.model.mtp import MTPBlock
from abyssal.model.rope import rotary_tables
from abyssal.ops.kernels import Kernels


class Embedding(nn.Module):
    """Token embedding, shared with the MTP modules."""

    def __init__(self, config: ModelConfig) -> None:
        """Allocate [V, D]."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ids [T] to [T, D]."""
        return F.embedding(tokens, self.weight)


class Trunk(nn.Module):
    """Everything below the output head; named `model` in checkpoints."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        """Build main layers and, after them, the MTP layers."""
        super().__init__()
        self.embed_tokens = Embedding(config)
        self.layers = nn.ModuleList(
            (Block if layer < config.num_hidden_layers else MTPBlock)(config, layer, kernels)
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels.rms_norm)


class Transformer(nn.Module):
    """DeepSeek-V3, over packed tokens, for training and serving alike.

    Parameters carry Hugging Face's names. They are allocated but not filled: see `initialise` and the checkpoint
    package. Activations are computed in `compute_dtype`, weights are cast to it on use.
    """

    def __init__(
        self, config: ModelConfig, kernels: Kernels | None = None, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        """Build the network with the given versions of the operations (none: the definitions)."""
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.kernels = kernels or Kernels()
        self.model = Trunk(config, self.kernels)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def head_weight(self) -> Tensor:
        """The output head's weight [V, D]: its own, or the embedding's where they are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def embed(self, tokens: Tensor) -> Tensor:
        """Map ids [T] to [T, D] in the compute dtype."""
        return self.model.embed_tokens(tokens).to(self.compute_dtype)  # type: ignore[no-any-return]

    def with_rotary(self, ctx: Context) -> Context:
        """Return `ctx` with the rotary tables of its positions, in at least fp32."""
        dtype = torch.promote_types(self.compute_dtype, torch.float32)
        return ctx.with_rotary(*rotary_tables(self.config, ctx.positions, dtype))

    def forward(self, tokens: Tensor, ctx: Context) -> Tensor:
        """Return the main model's hidden states after the final norm: ids [T] -> [T, D]."""
        ctx = self.with_rotary(ctx)
        h = self.embed(tokens)
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            h = layer(h, ctx)
        return self.model.norm(h)  # type: ignore[no-any-return]

    def logits(self, h: Tensor) -> Tensor:
        """Apply the output head: [T, D] -> [T, V], in h's dtype."""
        return F.linear(h, self.head_weight.to(h.dtype))

    @property
    def mtp_modules(self) -> list[MTPBlock]:
        """The MTP modules, shallowest first."""
        return list(self.model.layers[self.config.num_hidden_layers :])  # type: ignore[arg-type]

    def predict_further(self, h: Tensor, tokens: Tensor, ctx: Context) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the MTP modules over whole sequences, as in training.

        Module k sees positions 1..T-k of each sequence: the hidden state there, and the embedding of the token k
        places further on; the complete causal chain stays intact at every depth.

        Args:
            h: [T, D], from `forward`.
            tokens: [T], the same ids.

        Yields:
            For k = 1, 2, ...: hidden states [T_k, D] for the output head, and the indices [T_k] in the pack of the
            positions they belong to; position i predicts token i + k + 1.
        """
        whole = self.with_rotary(ctx)
        kept = torch.arange(len(tokens), device=tokens.device)
        for k, module in enumerate(self.mtp_modules, start=1):
            shorter, stay = whole.shortened(k)
            h = module.predict(h[torch.searchsorted(kept, stay)], self.embed(tokens[stay + k]), shorter)
            kept = stay
            yield h, kept
