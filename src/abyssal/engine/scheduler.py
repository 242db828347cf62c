"""Who computes what in the next step.

There are no phases. Each sequence has tokens, perhaps drafts behind them, and some of these computed; a step hands
out tokens of its budget so that computed catches up. A chunk of a prompt, one new token and the verification of drafts
are the same thing with other numbers.

Order is that of arrival. Those that decode come first within a step, since each takes few tokens and somebody reads
along; chunks of prompts share the rest. Where pages run short, the one that arrived last gives up its own and starts
over later, so the first one always goes on, and all come to an end.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from abyssal.engine.pages import ROOT_HASH, PageContent, PagePool, hash_page
from abyssal.engine.sequence import SequenceState


class Scheduler:
    """Holds all sequences that are not finished, and gives pages to those that run."""

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
            max_running: sequences that hold pages at a time.
            share_prefixes: let requests that begin alike use the same pages.
            lookahead: how many MTP layers should follow a sequence that makes so many running ones.
        """
        self.pool = pool
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []
        self.num_preempted = self.num_admitted_tokens = self.num_shared_tokens = 0
        self._max_step_tokens, self._max_running = max_step_tokens, max_running
        self._share_prefixes, self._lookahead = share_prefixes, lookahead

    def add(self, sequence: SequenceState) -> None:
        """Queue a sequence behind all others."""
        self.waiting.append(sequence)

    def schedule(self) -> dict[SequenceState, int]:
        """Return who computes how many tokens in this step; pages for all of them are in their tables then."""
        scheduled: dict[SequenceState, int] = {}
        num_preempted = self.num_preempted
        for running in sorted(self.running, key=lambda sequence: not sequence.is_decoding):
            left = self._max_step_tokens - sum(scheduled.values())
            if left and running in self.running and self._make_room(running, left, scheduled):
                scheduled[running] = min(running.num_pending, left)
        if self.num_preempted == num_preempted:  # who gave up pages must not take them back at once
            while (left := self._max_step_tokens - sum(scheduled.values())) and (admitted := self._admit()):
                scheduled[admitted] = min(admitted.num_pending, left)
        return scheduled

    def _make_room(self, sequence: SequenceState, left: int, scheduled: dict[SequenceState, int]) -> bool:
        """Extend the table of a running sequence for what it computes of `left` tokens, at the cost of others.

        Returns:
            Whether it still runs.
        """
        while not self.extend(sequence, sequence.num_computed + min(sequence.num_pending, left)):
            if sequence.drafts:
                sequence.drafts = []
                continue
            last = self.running[-1]
            scheduled.pop(last, None)
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def extend(self, sequence: SequenceState, num_places: int) -> bool:
        """Let a table hold `num_places` tokens; return whether there were pages for them."""
        missing = self.pool.pages_for(num_places) - len(sequence.pages)
        if missing > 0:
            pages = self.pool.allocate(missing, after=sequence.pages[-1] if sequence.pages else None)
            if pages is None:
                return False
            sequence.pages += pages
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        """Take the pages of a running sequence, the last, and let it wait as the first."""
        self.running.remove(sequence)
        self.pool.release(sequence.pages)
        sequence.reset()
        self.waiting.appendleft(sequence)
        self.num_preempted += 1

    def preempt_all(self) -> None:
        """Let all that run start over, in their order."""
        for sequence in reversed(self.running.copy()):
            self._preempt(sequence)

    def _admit(self) -> SequenceState | None:
        """Let the first that waits run, with pages for all its tokens, where that is possible."""
        if not self.waiting or len(self.running) == self._max_running or self.waiting[0].waits_for_prompt:
            return None
        sequence = self.waiting[0]
        tokens, size = sequence.tokens, self.pool.page_tokens
        lookahead = self._lookahead(len(self.running) + 1) if sequence.generates else 0
        shared: list[int] = []
        if self._share_prefixes:  # the newest token is computed in any case, for its output
            most = min(len(tokens) - (not lookahead), sequence.num_shareable + lookahead)
            shared = self.pool.find(tokens[:most], lookahead)
        self.pool.share(shared)
        pages = self.pool.allocate(self.pool.pages_for(len(tokens)) - len(shared), after=shared[-1] if shared else None)
        if pages is None:
            self.pool.release(shared)
            return None
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.pages = shared + pages
        sequence.num_computed = sequence.num_mtp_computed = len(shared) * size
        sequence.num_cached_pages = len(shared)
        sequence.page_hash = self.pool.hash(shared[-1]) if shared else ROOT_HASH
        sequence.lookahead, sequence.follows_mtp = lookahead, lookahead > 0
        self.num_admitted_tokens += len(tokens)
        self.num_shared_tokens += sequence.num_computed
        return sequence

    def cache_full_pages(self, sequence: SequenceState) -> None:
        """Let later requests find the pages that a sequence, if it runs, has filled by now."""
        if not self._share_prefixes or not sequence.pages:
            return
        size = self.pool.page_tokens
        for number in range(sequence.num_cached_pages, sequence.num_complete // size):
            part = tuple(sequence.tokens[number * size : (number + 1) * size + sequence.lookahead])
            sequence.page_hash = hash_page(sequence.page_hash, part)
            self.pool.cache_page(sequence.pages[number], PageContent(sequence.page_hash, part))
            sequence.num_cached_pages += 1

    def remove(self, sequence: SequenceState) -> None:
        """Forget a sequence, wherever it stands, and give back its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.release(sequence.pages)
        else:
            self.waiting.remove(sequence)
        sequence.reset()
        sequence.is_finished = True

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
            "the MTP layers do not run ahead": all(c.num_mtp_computed <= c.num_computed for c in running),
            "no draft stands beyond the last place": all(len(c.drafts) < max(c.num_left, 1) for c in running),
            "a page that is written to is read by nobody else": not any(
                self.pool.is_read_only(page) for c in running for page in c.pages[c.num_complete // size :]
            ),
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise RuntimeError(f"scheduler: broken: {'; '.join(broken)}")
