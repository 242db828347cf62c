"""The latent cache in pages: one storage for all layers, read and written through tables of pages.

Legend: T packed new tokens, S cached tokens of one continuation, L layers, P pages, C latent dim, R rotary dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.model import Context


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens at the places `start` to `start + count` of a text whose latents lie in `pages`."""

    pages: Sequence[int]
    start: int
    count: int


class PagedLatentCache:
    """Keeps C + R values a token and layer, in pages that any number of texts may share.

    The MTP layers stand behind the main ones and use the same tables. Which page belongs to whom is the pool's matter
    (abyssal.engine.pages); here are the numbers only.

    Paper: §2.1.1 eq. 1 and 3, the two boxed vectors.
    """

    def __init__(
        self, config: ModelConfig, num_pages: int, page_tokens: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Allocate `num_pages` pages of `page_tokens` places for all layers, MTP layers included."""
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.page_tokens = page_tokens
        self._storage = torch.empty((config.num_layers, num_pages, page_tokens, width), dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        """Bytes of all pages, used or not."""
        return self._storage.nbytes

    def begin(self, spans: Sequence[Span], first_layer: int = 0) -> Context:
        """Return the context of a pass over the tokens of `spans`, one behind another.

        Args:
            spans: the texts that take part, each with at least one token.
            first_layer: what the pass's layers, counted from 0, stand for in the storage.
        """
        device = self._storage.device
        positions = [place for span in spans for place in range(span.start, span.start + span.count)]
        return Context(
            lengths=tuple(span.count for span in spans),
            positions=torch.tensor(positions, device=device),  # [T]
            cache=PagedPass(self._storage[first_layer:], spans),
        )


class PagedPass:
    """The cache as one pass sees it: where its new tokens go, and what each of its texts reads."""

    def __init__(self, storage: Tensor, spans: Sequence[Span]) -> None:
        """Work out the places once for all layers; `storage` is [L, P, page_tokens, C+R]."""
        size = storage.shape[2]
        self._storage, self.num_appended = storage, 0
        slots = [
            span.pages[place // size] * size + place % size
            for span in spans
            for place in range(span.start, span.start + span.count)
        ]
        self._slots = torch.tensor(slots, device=storage.device)  # [T]
        self._reads = [self._read(span, size) for span in spans]

    def _read(self, span: Span, size: int) -> tuple[int, Tensor | None, int]:
        """Return the first page of a text, its pages to be gathered (None: they lie side by side), and its length."""
        length = span.start + span.count
        pages = list(span.pages[: -(-length // size)])
        side_by_side = pages == list(range(pages[0], pages[0] + len(pages)))
        return pages[0], None if side_by_side else torch.tensor(pages, device=self._storage.device), length

    def append(self, layer: int, c_kv: Tensor, k_rope: Tensor) -> list[Tensor]:
        """Write the new tokens of `layer` to their places and return what each text holds by now, in order.

        Args:
            layer: counted from the pass's first layer.
            c_kv: [T, C], normed latents; k_rope: [T, R], rotated keys; both in the cache's dtype, which is not cast.

        Returns:
            For each span [S, C+R]: a view where the pages lie side by side, else a copy.
        """
        pages = self._storage[layer]  # [P, page_tokens, C+R]
        flat = pages.flatten(0, 1)  # [P * page_tokens, C+R], a view
        flat.index_copy_(0, self._slots, torch.cat((c_kv, k_rope), -1))
        self.num_appended += 1
        size = pages.shape[1]
        return [
            flat[first * size : first * size + length]
            if table is None
            else pages.index_select(0, table).flatten(0, 1)[:length]
            for first, table, length in self._reads
        ]
