"""The whole network: embedding, blocks, final norm, output head, MTP modules.

Legend: T packed tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from abyssal.config import ModelConfig
from abyssal.model.block import Block
from abyssal.model.context import Context
from abyssal.model.layers import Linear, RMSNorm
from abyssal.model.mtp import MTPBlock
from abyssal.model.rope import rotary_tables
from abyssal.model.stage import Stage
from abyssal.ops.embedding import embed
from abyssal.ops.kernels import Kernels
from abyssal.ops.linear import CastWeight


class Embedding(nn.Module):
    """Token embedding, shared with the MTP modules."""

    def __init__(self, config: ModelConfig) -> None:
        """Allocate [V, D]."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Map ids [T] to [T, D] in `dtype`."""
        return embed(tokens, self.weight, dtype)


class Layers(nn.Module):
    """Blocks under their global numbers, whichever others are here: `layers[17]` is `layers.17` in every stage."""

    def __init__(self, blocks: Mapping[int, Block]) -> None:
        """Take the blocks by number."""
        super().__init__()
        for number, block in blocks.items():
            self.add_module(str(number), block)

    def __getitem__(self, number: int) -> Block:
        """The block of this number."""
        return self._modules[str(number)]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[Block]:
        """Every block, in order."""
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __len__(self) -> int:
        """How many blocks are here."""
        return len(self._modules)

    def items(self) -> Iterator[tuple[int, Block]]:
        """Every block with its number, in order."""
        return ((int(name), block) for name, block in self._modules.items())  # type: ignore[misc]


class Trunk(nn.Module):
    """Everything below the output head; named `model` in checkpoints."""

    def __init__(self, config: ModelConfig, kernels: Kernels, stage: Stage) -> None:
        """Build what `stage` has: main layers and, after them, the MTP layers."""
        super().__init__()
        if stage.needs_embedding(config):
            self.embed_tokens = Embedding(config)
        self.layers = Layers(
            {
                number: (Block if number < config.num_hidden_layers else MTPBlock)(config, number, kernels)
                for number in stage.block_numbers(config)
            }
        )
        if stage.has_head:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels.rms_norm)


class Transformer(nn.Module):
    """DeepSeek-V3 or a stage of it, over packed tokens, for training and serving alike.

    Parameters carry Hugging Face's names, in any stage. They are allocated but not filled: see `initialise` and the
    checkpoint package. Activations are computed in `compute_dtype`, weights are cast to it on use unless they are
    prepared (`abyssal.model.prepared`).
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels | None = None,
        compute_dtype: torch.dtype = torch.float32,
        stage: Stage | None = None,
    ) -> None:
        """Build a stage (none: the whole) with the given versions of the operations (none: the definitions)."""
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.kernels, self.stage = kernels or Kernels(), stage or Stage.whole(config)
        self.stage.check(config)
        self.model = Trunk(config, self.kernels, self.stage)
        if self.stage.has_head and not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def head_weight(self) -> Tensor:
        """The output head's weight [V, D], cast if it was prepared so: its own, or the embedding's if they are tied."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        prepared = self.lm_head.prepared
        return prepared.weight if isinstance(prepared, CastWeight) else self.lm_head.weight

    def embed(self, tokens: Tensor) -> Tensor:
        """Map ids [T] to [T, D] in the compute dtype."""
        return self.model.embed_tokens(tokens, self.compute_dtype)  # type: ignore[no-any-return]

    def with_rotary(self, ctx: Context) -> Context:
        """Return `ctx` with the rotary tables of its positions, in at least fp32."""
        dtype = torch.promote_types(self.compute_dtype, torch.float32)
        return ctx.with_rotary(*rotary_tables(self.config, ctx.positions, dtype))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Run the main layers that are here.

        Args:
            x: ids [T] where the stage has the embedding, else hidden states [T, D] of the stage before.
            ctx: without the rotary tables.

        Returns:
            [T, D], after the final norm where the stage has the head.
        """
        ctx = self.with_rotary(ctx)
        h = self.embed(x) if self.stage.has_embedding else x
        for number in self.stage.layers:
            h = self.model.layers[number](h, ctx)
        return self.model.norm(h) if self.stage.has_head else h

    def logits(self, h: Tensor) -> Tensor:
        """Apply the output head: [T, D] -> [T, V], in h's dtype."""
        return F.linear(h, self.head_weight.to(h.dtype))

    @property
    def mtp_modules(self) -> list[MTPBlock]:
        """The MTP modules, shallowest first."""
        return [block for block in self.model.layers if isinstance(block, MTPBlock)]

    def predict_further(
        self, h: Tensor, next_tokens: Sequence[Tensor], ctx: Context
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the MTP modules over whole sequences, as in training.

        Module k sees positions 1..T-k of each sequence: the hidden state there, and the embedding of the token k
        places further on; the complete causal chain stays intact at every depth.

        Args:
            h: [T, D], from `forward`.
            next_tokens: for each module the ids k places further on, [T] each; see `abyssal.model.mtp.next_tokens`.
            ctx: as for `forward`.

        Yields:
            For k = 1, 2, ...: hidden states [T_k, D] for the output head, and the indices [T_k] in the pack of the
            positions they belong to; position i predicts token i + k + 1.
        """
        whole = self.with_rotary(ctx)
        kept = torch.arange(len(h), device=h.device)
        for k, (module, tokens) in enumerate(zip(self.mtp_modules, next_tokens, strict=True), start=1):
            shorter, stay = whole.shortened(k)
            h = module.predict(h[torch.searchsorted(kept, stay)], self.embed(tokens[stay]), shorter)
            kept = stay
            yield h, kept
