"""Bits per byte: how many bits the model needs for each byte of documents it has not seen.

Legend: T packed tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.data.batch import evaluation_sequences
from abyssal.data.shards import Shards
from abyssal.model import Context, Transformer
from abyssal.parallel.apply import reshard
from abyssal.ranks.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Score:
    """Summed over all scored tokens, document ends included."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """The comparable figure, independent of the tokenizer; not a number where nothing was scored."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens if self.tokens else math.nan


@torch.no_grad()  # not inference mode, whose tensors must not stay in buffers of sharded weights
def score_documents(
    model: Transformer,
    shards: Shards,
    sequence_length: int,
    tokens_a_pass: int,
    max_bytes: int | None = None,
    ranks: Ranks = ALONE,
) -> Score:
    """Score each document from its own beginning, in consecutive windows of `sequence_length`.

    Every byte and every document end counts exactly once; no token sees another document.

    Args:
        tokens_a_pass: at most this many tokens are packed into one forward pass.
        max_bytes: score documents from the first on until this many bytes are reached; none: all.
        ranks: that score together, each a share of the packs.
    """
    device = next(model.buffers()).device
    nats = torch.zeros((), dtype=torch.float64)
    sequences = list(evaluation_sequences(shards, sequence_length, max_bytes))
    packs = list(_packs([sequence.tokens for sequence in sequences], tokens_a_pass))
    for first in range(0, len(packs), ranks.world_size):
        own = first + ranks.rank
        lengths, inputs, targets = packs[own if own < len(packs) else first]  # all ranks pass equally often
        h = model(inputs.to(device), Context.packed(lengths, device))
        loss = model.kernels.cross_entropy(h, model.head_weight, targets.to(device)).cpu()
        if own < len(packs):
            nats += loss
    reshard(model)
    return Score(
        nats=ranks.sum(nats).item(),
        tokens=sum(len(sequence.tokens) - 1 for sequence in sequences),
        bytes=sum(sequence.num_bytes for sequence in sequences),
    )


def _packs(sequences: Sequence[Tensor], limit: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Pack sequences of n + 1 tokens into (lengths, inputs [T], targets [T]) of at most `limit` tokens.

    Windows of one length go through attention in one call, so the full windows are packed apart from the rests.
    """
    by_fullness = sorted(sequences, key=len, reverse=True)
    full = len(by_fullness[0]) if by_fullness else 0
    for _, group in itertools.groupby(by_fullness, key=lambda sequence: len(sequence) == full):
        pack: list[Tensor] = []
        size = 0
        for sequence in group:
            if pack and size + len(sequence) - 1 > limit:
                yield _join(pack)
                pack, size = [], 0
            pack.append(sequence)
            size += len(sequence) - 1
        yield _join(pack)


def _join(pack: list[Tensor]) -> tuple[list[int], Tensor, Tensor]:
    inputs, targets = (torch.cat([s[part] for s in pack]) for part in (slice(None, -1), slice(1, None)))
    return [len(s) - 1 for s in pack], inputs, targets
