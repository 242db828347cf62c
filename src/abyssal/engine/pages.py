"""Which page of the latent cache holds what: in use and by how many, cached for a later request, or empty.

A page in use has references, one from each sequence whose table names it. A full page whose last reference goes
keeps its content under a hash, so that a request that begins with the same tokens can take it over; cached pages are
evicted, the one used longest ago first, when empty ones run out.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

#: The hash before the first page.
ROOT_HASH = b""


def hash_page(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the hash of a full page: a digest of its tokens and, through its parent's hash, of all tokens before."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class PageContent:
    """What a full page holds: its tokens behind those of its parents, which `hash` stands for.

    Where the MTP layers follow, their entries on the page know a few tokens behind it, and these are named too: a
    sequence that parts from this one right there would have others.
    """

    hash: bytes
    tokens: tuple[int, ...]


class PagePool:
    """Hands out `num_pages` pages of `page_tokens` token places each; knows nothing of tensors.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        """Start with all pages empty."""
        if num_pages < 1 or page_tokens < 1:
            raise ValueError(f"num_pages={num_pages}, page_tokens={page_tokens}: both must be at least 1")
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self._references = [0] * num_pages
        self._content: list[PageContent | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # pages without a reference, the longest unused first
        self._empty = np.ones(num_pages, dtype=bool)
        self._num_empty = num_pages

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could hand out."""
        return self._num_empty + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages without a reference whose content can still be shared."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages with a reference."""
        return self.num_pages - self.num_available

    def pages_for(self, tokens: int) -> int:
        """Return how many pages so many tokens take."""
        return -(-tokens // self.page_tokens)

    # Taking and giving back

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """Return `count` pages with one reference each, or None, with nothing changed, where there are too few.

        Neighbours where possible: first the one behind page `after`, then a place amid the widest room, since
        pages side by side are read without a copy.
        """
        if count > self.num_available:
            return None
        while self._num_empty < count:
            self._evict(next(iter(self._cached)))
        pages: list[int] = []
        while len(pages) < count:
            page = -1 if after is None else after + 1
            if not 0 <= page < self.num_pages or not self._empty[page]:
                page = self._widest_room(count - len(pages))
            self._empty[page] = False
            self._num_empty -= 1
            self._references[page] = 1
            pages.append(page)
            after = page
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Add a reference to pages that are in use or cached."""
        for page in pages:
            self._cached.pop(page, None)
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Take a reference from pages in the order of a table; the last of a sequence are then evicted first."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if self._content[page] is None:
                    self._make_empty(page)
                else:
                    self._cached[page] = None

    def references(self, page: int) -> int:
        """Return how many tables name `page`."""
        return self._references[page]

    # Sharing by content

    def cache_page(self, page: int, content: PageContent) -> None:
        """Let later requests find a full page in use; what another page holds already is not cached twice."""
        if content.hash not in self._page_of:
            self._page_of[content.hash] = page
            self._content[page] = content

    def drop_cached(self) -> None:
        """Let nobody find the content of any page that is here by now; pages in use stay so."""
        for page in list(self._cached):
            self._evict(page)
        self._page_of.clear()
        self._content = [None] * self.num_pages

    def find(self, tokens: Sequence[int], lookahead: int) -> list[int]:
        """Return the pages that hold the beginning of `tokens`, full pages only; they are not referenced yet.

        Args:
            tokens: of a sequence.
            lookahead: how many tokens behind a page its content depends on.
        """
        pages: list[int] = []
        page_hash, size = ROOT_HASH, self.page_tokens
        for end in range(size, len(tokens) - lookahead + 1, size):
            part = tuple(tokens[end - size : end + lookahead])
            page_hash = hash_page(page_hash, part)
            page = self._page_of.get(page_hash)
            content = None if page is None else self._content[page]
            if page is None or content is None or content.tokens != part:
                break
            pages.append(page)
        return pages

    def is_read_only(self, page: int) -> bool:
        """Whether a page must not be written to: others read it, or will."""
        return self._references[page] > 1 or self._content[page] is not None

    def hash(self, page: int) -> bytes:
        """Return the hash of a page that `find` returned."""
        content = self._content[page]
        assert content is not None, "a page without content is not found"
        return content.hash

    # Inner steps

    def _evict(self, page: int) -> None:
        """Empty a cached page."""
        content = self._content[page]
        assert content is not None, "a page without content is not cached"
        del self._page_of[content.hash], self._cached[page]
        self._content[page] = None
        self._make_empty(page)

    def _make_empty(self, page: int) -> None:
        self._empty[page] = True
        self._num_empty += 1

    def _widest_room(self, count: int) -> int:
        """Return where `count` pages would stand amid the widest run of empty ones, at its start if it is the first."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], self._empty, [False])).astype(np.int8)))
        starts, ends = edges[::2], edges[1::2]
        widest = int((ends - starts).argmax())
        start, end = int(starts[widest]), int(ends[widest])
        return start if start == 0 else start + max(end - start - count, 0) // 2

    def check_integrity(self) -> None:
        """Verify the rules that every operation keeps.

        Raises:
            RuntimeError: one of them is broken, which is a defect of ours.
        """
        pages = range(self.num_pages)
        held = {content.hash: page for page, content in enumerate(self._content) if content is not None}
        rules = {
            "no page has fewer than no references": min(self._references) >= 0,
            "a page is in use, cached or empty, and one of these": all(
                (self._references[page] > 0) + (page in self._cached) + bool(self._empty[page]) == 1 for page in pages
            ),
            "the empty pages are counted": self._num_empty == int(self._empty.sum()),
            "a cached page has content, an empty one none": all(
                self._content[page] is not None
                if page in self._cached
                else not self._empty[page] or not self._content[page]
                for page in pages
            ),
            "a hash leads to the page that holds its content, and no other page holds it": held == self._page_of
            and len(held) == sum(content is not None for content in self._content),
            "content fills its page": all(
                content is None or len(content.tokens) >= self.page_tokens for content in self._content
            ),
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise RuntimeError(f"pages: broken: {'; '.join(broken)}")
