"""Who computes what in the next step.

There are no phases. Each continuation has tokens, perhaps drafts behind them, and some of these computed; a step hands
out tokens of its budget so that computed catches up. A chunk of a prompt, one new token and the verification of drafts
are the same thing with other numbers.

Order is that of arrival. Those that decode come first within a step, since each takes few tokens and somebody reads
along; chunks of prompts share the rest. Where pages run short, the one that arrived last gives up its own and starts
over later, so the first one always goes on, and all come to an end.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from abyssal.engine.pages import ROOT, Content, PagePool, chain_key
from abyssal.engine.request import Continuation


class Scheduler:
    """Holds all continuations that are not finished, and gives pages to those that run."""

    def __init__(
        self,
        pool: PagePool,
        *,
        max_step_tokens: int,
        max_running: int,
        share_prefixes: bool,
        lookahead: Callable[[int], int],
    ) -> None:
        """Start idle.

        Args:
            pool: the pages.
            max_step_tokens: tokens and drafts of one step.
            max_running: continuations that hold pages at a time.
            share_prefixes: let requests that begin alike use the same pages.
            lookahead: how many MTP layers should follow a continuation that makes so many running ones.
        """
        self.pool = pool
        self.waiting: deque[Continuation] = deque()
        self.running: list[Continuation] = []
        self.num_preempted = self.num_admitted_tokens = self.num_shared_tokens = 0
        self._max_step_tokens, self._max_running = max_step_tokens, max_running
        self._share_prefixes, self._lookahead = share_prefixes, lookahead

    def add(self, continuation: Continuation) -> None:
        """Queue a continuation behind all others."""
        self.waiting.append(continuation)

    def schedule(self) -> dict[Continuation, int]:
        """Return who computes how many tokens in this step; pages for all of them are in their tables then."""
        shares: dict[Continuation, int] = {}
        num_preempted = self.num_preempted
        for running in sorted(self.running, key=lambda continuation: not continuation.is_decoding):
            left = self._max_step_tokens - sum(shares.values())
            if left and running in self.running and self._make_room(running, left, shares):
                shares[running] = min(running.num_pending, left)
        if self.num_preempted == num_preempted:  # who gave up pages must not take them back at once
            while (left := self._max_step_tokens - sum(shares.values())) and (admitted := self._admit()):
                shares[admitted] = min(admitted.num_pending, left)
        return shares

    def _make_room(self, continuation: Continuation, left: int, shares: dict[Continuation, int]) -> bool:
        """Extend the table of a running continuation for what it computes of `left` tokens, at the cost of others.

        Returns:
            Whether it still runs.
        """
        while not self.extend(continuation, continuation.num_computed + min(continuation.num_pending, left)):
            if continuation.drafts:
                continuation.drafts = []
                continue
            last = self.running[-1]
            shares.pop(last, None)
            self._preempt(last)
            if last is continuation:
                return False
        return True

    def extend(self, continuation: Continuation, num_places: int) -> bool:
        """Let a table hold `num_places` tokens; return whether there were pages for them."""
        missing = self.pool.pages_for(num_places) - len(continuation.pages)
        if missing > 0:
            pages = self.pool.allocate(missing, after=continuation.pages[-1] if continuation.pages else None)
            if pages is None:
                return False
            continuation.pages += pages
        return True

    def _preempt(self, continuation: Continuation) -> None:
        """Take the pages of a running continuation, the last, and let it wait as the first."""
        self.running.remove(continuation)
        self.pool.release(continuation.pages)
        continuation.start_over()
        self.waiting.appendleft(continuation)
        self.num_preempted += 1

    def _admit(self) -> Continuation | None:
        """Let the first that waits run, with pages for all its tokens, where that is possible."""
        if not self.waiting or len(self.running) == self._max_running or self.waiting[0].waits_for_prompt:
            return None
        continuation = self.waiting[0]
        tokens, size = continuation.tokens, self.pool.page_tokens
        lookahead = self._lookahead(len(self.running) + 1)
        shared: list[int] = []
        if self._share_prefixes:  # the newest token is computed in any case, for its output
            shared = self.pool.find(tokens[: len(tokens) - (not lookahead)], lookahead)
        self.pool.share(shared)
        pages = self.pool.allocate(self.pool.pages_for(len(tokens)) - len(shared), after=shared[-1] if shared else None)
        if pages is None:
            self.pool.release(shared)
            return None
        self.waiting.popleft()
        self.running.append(continuation)
        continuation.pages = shared + pages
        continuation.num_computed = continuation.num_settled = len(shared) * size
        continuation.num_keyed_pages = len(shared)
        continuation.key = self.pool.key(shared[-1]) if shared else ROOT
        continuation.lookahead, continuation.is_followed = lookahead, lookahead > 0
        self.num_admitted_tokens += len(tokens)
        self.num_shared_tokens += continuation.num_computed
        return continuation

    def keep_full_pages(self, continuation: Continuation) -> None:
        """Let later requests find the pages that a continuation, if it runs, has filled by now."""
        if not self._share_prefixes or not continuation.pages:
            return
        size = self.pool.page_tokens
        for number in range(continuation.num_keyed_pages, continuation.num_complete // size):
            part = tuple(continuation.tokens[number * size : (number + 1) * size + continuation.lookahead])
            continuation.key = chain_key(continuation.key, part)
            self.pool.keep(continuation.pages[number], Content(continuation.key, part))
            continuation.num_keyed_pages += 1

    def remove(self, continuation: Continuation) -> None:
        """Forget a continuation, wherever it stands, and give back its pages."""
        if continuation in self.running:
            self.running.remove(continuation)
            self.pool.release(continuation.pages)
        else:
            self.waiting.remove(continuation)
        continuation.start_over()
        continuation.is_finished = True

    def check_integrity(self) -> None:
        """Verify the rules that every operation keeps, the pool's among them.

        Raises:
            RuntimeError: one of them is broken, which is a defect of ours.
        """
        self.pool.check_integrity()
        size, running = self.pool.page_tokens, self.running
        named = Counter(page for c in running for page in c.pages)
        order = [(c.request_id, c.index) for c in [*running, *self.waiting]]
        rules = {
            "who runs arrived before who waits": order == sorted(order) and len(set(order)) == len(order),
            "no more run than may": len(running) <= self._max_running,
            "a page has a reference for each table that names it": all(
                self.pool.references(page) == named[page] for page in range(self.pool.num_pages)
            ),
            "a table names a page once": all(len(set(c.pages)) == len(c.pages) for c in running),
            "who waits holds nothing": not any(c.pages or c.num_computed or c.drafts for c in self.waiting),
            "what is computed has places": all(c.num_computed <= len(c.pages) * size for c in running),
            "there is something to compute": all(c.num_computed < len(c.tokens) for c in running),
            "the MTP layers do not run ahead": all(c.num_settled <= c.num_computed for c in running),
            "no draft stands beyond the last place": all(len(c.drafts) < max(c.num_left, 1) for c in running),
            "a page that is written to is read by nobody else": not any(
                self.pool.is_shared_or_kept(page) for c in running for page in c.pages[c.num_complete // size :]
            ),
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise RuntimeError(f"scheduler: broken: {'; '.join(broken)}")
