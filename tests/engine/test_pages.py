from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from abyssal.engine.pages import ROOT_HASH, PageContent, PagePool, hash_page


def fill(pool: PagePool, table: list[int], tokens: list[int], lookahead: int = 0) -> None:
    """Keep every full page of a table."""
    key = ROOT_HASH
    for number, page in enumerate(table):
        end = (number + 1) * pool.page_tokens
        part = tuple(tokens[end - pool.page_tokens : end + lookahead])
        if len(part) == pool.page_tokens + lookahead:
            key = hash_page(key, part)
            pool.cache_page(page, PageContent(key, part))


class Tables(RuleBasedStateMachine):
    """Texts of a three-letter alphabet come, share, grow, end; a model of what each page must hold runs along."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(13, 3)
        self.tables: list[tuple[list[int], list[int]]] = []
        self.holds: dict[int, tuple[int, ...]] = {}  # page -> all tokens up to its end

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=14))
    def begin(self, tokens: list[int]) -> None:
        shared = self.pool.find(tokens, 0)
        for number, page in enumerate(shared):
            assert self.holds[page] == tuple(tokens[: (number + 1) * 3])
        self.pool.share(shared)
        available = self.pool.num_available
        pages = self.pool.allocate(self.pool.pages_for(len(tokens)) - len(shared), after=shared[-1] if shared else None)
        if pages is None:
            assert available < self.pool.pages_for(len(tokens)) - len(shared)
            self.pool.release(shared)
            return
        assert self.pool.num_available == available - len(pages)
        table = shared + pages
        self.tables.append((tokens, table))
        fill(self.pool, table, tokens)
        for number, page in enumerate(table):
            self.holds[page] = tuple(tokens[: (number + 1) * 3])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: Any) -> None:
        _, table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def grow(self, data: Any) -> None:
        tokens, table = self.tables[data.draw(st.integers(0, len(self.tables) - 1))]
        pages = self.pool.allocate(1, after=table[-1])
        if pages is not None and len(tokens) % 3 == 0:
            table += pages
            tokens += [0]
            self.holds[pages[0]] = tuple(tokens)
        elif pages is not None:
            self.pool.release(pages)

    @invariant()
    def every_rule_holds(self) -> None:
        self.pool.check_integrity()
        used = {page for _, table in self.tables for page in table}
        assert self.pool.num_used == len(used)
        for page in used:
            assert self.pool.references(page) == sum(page in table for _, table in self.tables)

    @invariant()
    def pages_in_use_keep_what_they_hold(self) -> None:
        for tokens, table in self.tables:
            for number, page in enumerate(table):
                assert self.holds[page] == tuple(tokens[: (number + 1) * 3])

    def teardown(self) -> None:
        for _, table in self.tables:
            self.pool.release(table)
        assert self.pool.num_used == 0


Tables.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
test_pages_are_shared_by_content_and_never_twice_in_use = Tables.TestCase


def test_a_text_that_grows_gets_pages_side_by_side_while_others_grow_too() -> None:
    pool = PagePool(64, 4)
    tables = [pool.allocate(2) for _ in range(4)]
    for _ in range(6):
        for table in tables:
            assert table is not None
            more = pool.allocate(1, after=table[-1])
            assert more is not None
            table += more
    for table in tables:
        assert table is not None
        assert table == list(range(table[0], table[0] + 8))


def test_the_page_that_was_used_longest_ago_is_given_away_first_and_of_a_text_the_last() -> None:
    pool = PagePool(6, 2)
    texts = ([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12])
    for tokens in texts:
        pages = pool.allocate(3)
        assert pages is not None
        fill(pool, pages, tokens)
        pool.release(pages)
    pool.share(found := pool.find(texts[0], 0))  # used again, so the other is the older one
    pool.release(found)
    for kept in ((3, 3), (3, 2), (3, 1), (3, 0), (2, 0), (1, 0), (0, 0)):
        assert tuple(len(pool.find(tokens, 0)) for tokens in texts) == kept
        pool.allocate(1)
    assert pool.num_available == 0


def test_a_page_is_found_only_behind_the_same_tokens_and_with_the_same_tokens_behind_it() -> None:
    pool = PagePool(8, 2)
    pages = pool.allocate(3)
    assert pages is not None
    fill(pool, pages, [1, 2, 3, 4, 5, 6, 7], lookahead=1)
    assert pool.find([1, 2, 3, 4, 5, 6, 7], 1) == pages
    assert pool.find([1, 2, 3, 4, 5, 6], 1) == pages[:2]
    assert pool.find([1, 2, 3, 4, 6, 6, 7], 1) == pages[:1]
    assert pool.find([1, 2, 3, 4, 5, 6, 7], 0) == []
    assert pool.find([3, 4, 5, 6, 7], 1) == []


def test_equal_keys_of_other_tokens_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = PagePool(4, 2)
    pages = pool.allocate(1)
    assert pages is not None
    monkeypatch.setattr("abyssal.engine.pages.hash_page", lambda parent, tokens: b"one for all")
    pool.cache_page(pages[0], PageContent(b"one for all", (1, 2)))
    assert pool.find([1, 2], 0) == pages
    assert pool.find([1, 3], 0) == []


def test_too_few_pages_change_nothing() -> None:
    pool = PagePool(3, 2)
    pages = pool.allocate(2)
    assert pages is not None
    fill(pool, pages, [1, 2, 3, 4])
    pool.release(pages)
    assert pool.allocate(4) is None
    assert pool.find([1, 2, 3, 4], 0) == pages
    pool.check_integrity()


def test_a_broken_rule_is_named() -> None:
    pool = PagePool(3, 2)
    pool.allocate(1)
    pool._references[0] = 0
    with pytest.raises(RuntimeError, match="pages: broken: a page is in use, cached or empty, and one of these"):
        pool.check_integrity()


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="both must be at least 1"):
        PagePool(*sizes)
