"""What a forward pass knows beside the token ids: sequences, positions, cache, and where statistics go.

Legend: T packed tokens, S cached tokens of one sequence, C latent dim, R rotary dims, E routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor


class LatentCache(Protocol):
    """Where attention over a cache keeps its latents; the engine owns it."""

    def append(self, layer: int, c_kv: Tensor, k_rope: Tensor) -> Sequence[Tensor]:
        """Add the new tokens' latents ([T, C], [T, R]) of `layer`.

        Returns:
            For each sequence of the context everything that is cached by now, latent and key side by side: [S, C+R].
        """
        ...


@dataclass
class RouterStatistics:
    """What the routers of one micro-batch report, by layer.

    A layer writes its entry, it never adds to it: a forward pass that is repeated by recomputation counts once.
    """

    expert_load: dict[int, Tensor] = field(default_factory=dict)  # layer -> [E] tokens sent to each expert
    balance_loss: dict[int, Tensor] = field(default_factory=dict)  # layer -> [], mean over sequences, without alpha


@dataclass(frozen=True)
class Context:
    """The frozen surroundings of one forward pass over packed tokens.

    `lengths` are the tokens of each sequence, one after another in the pack; tokens of different sequences never see
    each other. `positions` [T] count within a sequence. What the balance loss calls a sequence may be something else,
    a window of several documents for example: `balance_lengths` then are the tokens of each; none means `lengths`.
    `balance_weight` multiplies each such sequence's balance loss (alpha over those of the whole batch); 0 leaves the
    loss out.
    """

    lengths: tuple[int, ...]
    positions: Tensor
    cache: LatentCache | None = None
    statistics: RouterStatistics | None = None
    balance_weight: float = 0.0
    balance_lengths: tuple[int, ...] | None = None
    rotary: tuple[Tensor, Tensor] | None = None

    @classmethod
    def packed(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Context:
        """Return the context of whole sequences, each starting at position 0."""
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])  # [T]
        return cls(lengths=tuple(lengths), positions=positions)

    def with_rotary(self, cos: Tensor, sin: Tensor) -> Context:
        """Return this context with the angles of its positions: [T, R/2] each."""
        return replace(self, rotary=(cos, sin))

    def shortened(self, k: int) -> tuple[Context, Tensor]:
        """Return the context without the last k tokens of each sequence, and the indices [T'] of those that stay.

        A sequence of k tokens or fewer keeps its place with none.
        """
        stays = torch.ones(len(self.positions), dtype=torch.bool)  # on the CPU, so that no device is waited for
        for n, end in zip(self.lengths, accumulate(self.lengths), strict=True):
            stays[end - min(n, k) : end] = False
        lengths = tuple(max(n - k, 0) for n in self.lengths)
        balance_lengths = self.balance_lengths
        if balance_lengths is not None:
            balance_lengths = tuple(int(part.sum()) for part in stays.split(list(balance_lengths)))
        kept = stays.nonzero().flatten().to(self.positions.device)
        rotary = None if self.rotary is None else (self.rotary[0][kept], self.rotary[1][kept])
        shorter = replace(
            self, lengths=lengths, balance_lengths=balance_lengths, positions=self.positions[kept], rotary=rotary
        )
        return shorter, kept
