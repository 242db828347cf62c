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
from abyssal.ops.latent_attention import PaddedLatents

ROUND = 64  # each new length of what several texts read costs the matrix library a kernel


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
        # Zeros: what stands behind a short text is multiplied with weights of 0 beside longer ones.
        self._storage = torch.zeros((config.num_layers, num_pages, page_tokens, width), dtype=dtype, device=device)

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
        self._storage, self.num_appended = storage, 0
        size = self._page_tokens = storage.shape[2]
        slots = [
            span.pages[place // size] * size + place % size
            for span in spans
            for place in range(span.start, span.start + span.count)
        ]
        self._slots = torch.tensor(slots, device=storage.device)  # [T]
        self._lengths = tuple(span.start + span.count for span in spans)
        self._tables = [
            list(span.pages[: -(-length // size)]) for span, length in zip(spans, self._lengths, strict=True)
        ]
        self._padded: _Gather | None = None
        self._reads: list[int | _Gather] = []  # of each text its first page, where all lie side by side
        if len(spans) > 1 and all(span.count == 1 for span in spans):
            width = -(-max(self._lengths) // ROUND) * ROUND
            num_pages = -(-width // size)
            rows = [table + table[:1] * (num_pages - len(table)) for table in self._tables]
            self._padded = _Gather(storage, [page for row in rows for page in row])
        else:
            self._reads = [
                table[0] if table == list(range(table[0], table[0] + len(table))) else _Gather(storage, table)
                for table in self._tables
            ]

    def append(self, layer: int, c_kv: Tensor, k_rope: Tensor) -> Sequence[Tensor]:
        """Write the new tokens of `layer` to their places and return what each text holds by now, in order.

        Args:
            layer: counted from the pass's first layer.
            c_kv: [T, C], normed latents; k_rope: [T, R], rotated keys; both in the cache's dtype, which is not cast.

        Returns:
            For each span [S, C+R], good until the next layer is appended. Where every text has one new token they
            stand side by side; else each is a view where its pages lie side by side, or a copy.
        """
        pages = self._storage[layer]  # [P, page_tokens, C+R]
        flat = pages.flatten(0, 1)  # [P * page_tokens, C+R], a view
        flat.index_copy_(0, self._slots, torch.cat((c_kv, k_rope), -1))
        self.num_appended += 1
        if self._padded is not None:
            return PaddedLatents(self._padded.read(pages).view(len(self._lengths), -1, flat.shape[-1]), self._lengths)
        return [
            read.read(pages)[:length] if isinstance(read, _Gather) else flat[read * self._page_tokens :][:length]
            for read, length in zip(self._reads, self._lengths, strict=True)
        ]


class _Gather:
    """Pages of a table copied side by side, layer after layer into the same place."""

    def __init__(self, storage: Tensor, table: Sequence[int]) -> None:
        self._table = torch.tensor(table, device=storage.device)
        self._copy = storage.new_empty((len(table), *storage.shape[2:]))  # [pages, page_tokens, C+R]

    def read(self, pages: Tensor) -> Tensor:
        """Return the rows [pages * page_tokens, C+R] of a layer's `pages`."""
        return torch.index_select(pages, 0, self._table, out=self._copy).flatten(0, 1)
