"""The latent cache in pages: one storage for all layers, read and written through tables of pages.

Legend: T packed new tokens, S cached tokens of one sequence, L layers, P pages, C latent dim, R rotary dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.model import Context
from abyssal.ops.latent_attention import PaddedLatents

ALIGNMENT = 64  # bytes, as torch aligns its own tensors
ROUND = 64  # each new length of what several sequences read costs the matrix library a kernel


@dataclass(frozen=True, slots=True)
class TokenRange:
    """New tokens at the places `start` to `start + count` of a sequence whose latents lie in `pages`."""

    pages: Sequence[int]
    start: int
    count: int


class PagedLatentCache:
    """Keeps C + R values a token and layer, in pages that any number of sequences may share.

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
        # Zeros: what stands behind a short sequence is multiplied with weights of 0 beside longer ones.
        self._storage = _zeros((config.num_layers, num_pages, page_tokens, width), dtype, torch.device(device))

    @property
    def bytes(self) -> int:
        """Bytes of all pages, used or not."""
        return self._storage.nbytes

    def begin(self, ranges: Sequence[TokenRange], first_layer: int = 0) -> Context:
        """Return the context of a pass over the tokens of `ranges`, one behind another.

        Args:
            ranges: the sequences that take part, each with at least one token.
            first_layer: what the pass's layers, counted from 0, stand for in the storage.
        """
        device = self._storage.device
        positions = [place for new in ranges for place in range(new.start, new.start + new.count)]
        return Context(
            lengths=tuple(new.count for new in ranges),
            positions=torch.tensor(positions, device=device),  # [T]
            cache=PagedCacheView(self._storage[first_layer:], ranges),
        )


class PagedCacheView:
    """The cache as one pass sees it: where its new tokens go, and what each of its sequences reads."""

    def __init__(self, storage: Tensor, ranges: Sequence[TokenRange]) -> None:
        """Work out the places once for all layers; `storage` is [L, P, page_tokens, C+R]."""
        self._storage, self.num_appended = storage, 0
        size = self._page_tokens = storage.shape[2]
        slots = [
            new.pages[place // size] * size + place % size
            for new in ranges
            for place in range(new.start, new.start + new.count)
        ]
        self._slots = torch.tensor(slots, device=storage.device)  # [T]
        self._lengths = tuple(new.start + new.count for new in ranges)
        self._tables = [
            list(new.pages[: -(-length // size)]) for new, length in zip(ranges, self._lengths, strict=True)
        ]
        self._padded: _Gather | None = None
        self._reads: list[int | _Gather] = []  # of each sequence its first page, where all lie side by side
        if len(ranges) > 1 and all(new.count == 1 for new in ranges):
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
        """Write the new tokens of `layer` to their places and return what each sequence holds by now, in order.

        Args:
            layer: counted from the pass's first layer.
            c_kv: [T, C], normed latents; k_rope: [T, R], rotated keys; both in the cache's dtype, which is not cast.

        Returns:
            For each range [S, C+R], good until the next layer is appended. Where every sequence has one new token
            they stand side by side; else each is a view where its pages lie side by side, or a copy.
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


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on the CPU they take memory only as they are written to, where `torch.zeros` writes all of them."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(num_bytes + ALIGNMENT, dtype=np.uint8))
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).view(shape)
