"""What a forward pass knows beside the token ids: sequences, positions, cache, and where statistics go.

Legend: T packed tokens, S cached tokens of one sequence, C latent dim, R rotary dims, E routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    each other. `positions` [T] count within a sequence. `balance_weight` multiplies each sequence's balance loss
    (alpha over the sequences of the whole batch); 0 leaves the loss out.
    """

    lengths: tuple[int, ...]
    positions: Tensor
    cache: LatentCache | None = None
    statistics: RouterStatistics | None = None
    balance_weight: float = 0.0
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
        device = self.positions.device
        starts = torch.tensor(self.lengths).cumsum(0) - torch.tensor(self.lengths)
        lengths = tuple(max(n - k, 0) for n in self.lengths)
        kept = torch.cat([torch.arange(a, a + n) for a, n in zip(starts.tolist(), lengths, strict=True)])
        kept = kept.to(device)
        rotary = None if self.rotary is None else (self.rotary[0][kept], self.rotary[1][kept])
        return replace(self, lengths=lengths, positions=self.positions[kept], rotary=rotary), kept
