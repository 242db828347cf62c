"""Which experts the tokens of a pass went to, noted where they are sent: for a look at the router, not for its work.

Legend: T packed tokens, M places, L layers with experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abyssal.model import Transformer
from abyssal.model.feed_forward import Dispatcher, MixtureOfExperts, State


class ExpertRecord:
    """The choices of the latest pass over the main layers of a model."""

    def __init__(self, model: Transformer) -> None:
        """Take a place in the dispatchers' seam of every main layer with experts, before what stands there."""
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> weights and experts, [T, K] each
        for layer in range(model.config.num_hidden_layers):
            feed_forward = model.model.layers[layer].mlp
            if isinstance(feed_forward, MixtureOfExperts):
                before = feed_forward.dispatcher
                inner = before.inner if isinstance(before, _NotingDispatcher) else before
                feed_forward.dispatcher = _NotingDispatcher(inner, layer, self._chosen)

    def at(self, rows: Sequence[int]) -> list[tuple[tuple[int, ...], ...]]:
        """Return for each place [M] of the latest pass its experts, layer by layer, the weightiest first."""
        if not self._chosen or not rows:
            return [() for _ in rows]
        weights, experts = (torch.stack(parts, 1)[list(rows)] for parts in zip(*self._chosen.values(), strict=True))
        ranked = experts.gather(-1, weights.argsort(-1, descending=True))  # [M, L, K]
        return [tuple(map(tuple, place)) for place in ranked.tolist()]


class _NotingDispatcher:
    """Notes what goes through, and lets another dispatcher do the work."""

    def __init__(self, inner: Dispatcher, layer: int, chosen: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.inner, self._layer, self._chosen = inner, layer, chosen

    def dispatch(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> State:
        self._chosen[self._layer] = (weights, experts)
        return self.inner.dispatch(hidden, weights, experts)

    def combine(self, state: State) -> Tensor:
        return self.inner.combine(state)
