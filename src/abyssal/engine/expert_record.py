"""Which experts the tokens of a pass went to, recorded where they are dispatched: to look at the router, not to route.

Legend: T packed tokens, M positions, L layers with experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abyssal.model import Transformer
from abyssal.model.dispatcher import Dispatcher, InFlight
from abyssal.model.feed_forward import MixtureOfExperts


class ExpertRecord:
    """The choices of the latest pass over the main layers of a model."""

    def __init__(self, model: Transformer) -> None:
        """Listen at the dispatcher of every main layer with experts."""
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> weights and experts, [T, K] each
        for layer in range(model.config.num_hidden_layers):
            feed_forward = model.model.layers[layer].mlp
            if isinstance(feed_forward, MixtureOfExperts):
                dispatcher = feed_forward.dispatcher
                inner = dispatcher.inner if isinstance(dispatcher, _RecordingDispatcher) else dispatcher
                feed_forward.dispatcher = _RecordingDispatcher(inner, layer, self._chosen)

    def at(self, rows: Sequence[int]) -> list[tuple[tuple[int, ...], ...]]:
        """Return for each position [M] of the latest pass its experts, layer by layer, the largest weight first."""
        if not self._chosen or not rows:
            return [() for _ in rows]
        weights, experts = (torch.stack(parts, 1)[list(rows)] for parts in zip(*self._chosen.values(), strict=True))
        ranked = experts.gather(-1, weights.argsort(-1, descending=True))  # [M, L, K]
        return [tuple(map(tuple, place)) for place in ranked.tolist()]


class _RecordingDispatcher:
    """Records the choices that go through, and lets another dispatcher do the work."""

    def __init__(self, inner: Dispatcher, layer: int, chosen: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.inner, self._layer, self._chosen = inner, layer, chosen
        self.finish_dispatch, self.start_combine = inner.finish_dispatch, inner.start_combine
        self.finish_combine = inner.finish_combine

    def start_dispatch(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> InFlight:
        self._chosen[self._layer] = (weights, experts)
        return self.inner.start_dispatch(hidden, weights, experts)
