"""What one text leaves in the latent caches for a later text that begins in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from abyssal.engine.latent_cache import ContiguousLatentCache
from abyssal.model import Transformer

if TYPE_CHECKING:
    from abyssal.engine.speculate import MTPDrafter


class KeptCache:
    """A latent cache that outlives a call of `generate`, with the ids of the tokens in it.

    Give it to one call after the other: each finds the longest beginning of its prompt that is still held, and runs
    only the rest. A call may be broken off anywhere, also by an exception. One call at a time.
    """

    def __init__(self, model: Transformer) -> None:
        """Hold nothing yet, of a model that is prepared by `use_latent_cache`."""
        self.cache = ContiguousLatentCache(model.config, 1, dtype=model.compute_dtype, device=model.head_weight.device)
        #: What drafts for these texts, once one was generated speculatively.
        self.drafter: MTPDrafter | None = None
        #: Tokens of the newest prompt that did not run again.
        self.reused = 0
        self._ids: list[int] = []

    def resume(self, prompt_ids: Sequence[int], capacity_tokens: int, at_most: int | None = None) -> int:
        """Go back to the beginning that the held text and a prompt share, and return its length.

        Args:
            prompt_ids: its last token is always left to run, since its output is needed.
            capacity_tokens: room that the cache has afterwards.
            at_most: keep no more tokens than this.
        """
        limit = len(prompt_ids) - 1 if at_most is None else min(len(prompt_ids) - 1, at_most)
        self.reused = min(shared_length(self._ids[: self.cache.lengths[0]], prompt_ids), limit)
        self.cache.truncate(0, self.reused)
        self.cache.reserve(capacity_tokens)
        del self._ids[self.reused :]
        return self.reused

    def note(self, ids: Sequence[int]) -> None:
        """Take down tokens that the next pass adds to the cache; one that is broken off adds none."""
        del self._ids[self.cache.lengths[0] :]
        self._ids += ids


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
