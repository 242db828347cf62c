"""Whether drafts are worth their time, by measurement: at some loads a pass over more tokens costs too much."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median

#: Passes with drafts, then passes without, that each round of measurement takes; a round goes on for so many passes.
PASSES_WITH, PASSES_WITHOUT, ROUND = 16, 8, 1024


@dataclass
class _Load:
    """What was measured at one load, in this round."""

    with_drafts: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=64))  # seconds, tokens
    without: deque[float] = field(default_factory=lambda: deque(maxlen=PASSES_WITHOUT))  # seconds
    passes_with: int = 0
    passes_without: int = 0
    passes: int = 0

    @property
    def is_measured(self) -> bool:
        """Whether this round's measurement is over."""
        return self.passes_with >= PASSES_WITH and self.passes_without >= PASSES_WITHOUT

    @property
    def pays(self) -> bool:
        """Whether a text grows faster with drafts."""
        seconds = median(seconds for seconds, _ in self.with_drafts)
        tokens = fmean(tokens for _, tokens in self.with_drafts)
        return tokens / seconds > 1 / median(self.without)


class AdaptiveDrafts:
    """Decides about drafts from the times of passes that only decode.

    The rule: at each load (running texts, in powers of two) a round of 1,024 passes begins with 16 that verify drafts
    and 8 that do not. For the rest of the round drafts are made if, by medians of the times, more tokens a second came
    with them than without: (tokens a text and pass) / (time of the pass and of drafting) > 1 / (time of a plain pass).
    Where they do not pay, the MTP layers stop following; texts that begin in a later measurement are followed again.
    """

    def __init__(self, *, adapts: bool = True) -> None:
        """Start without measurements; where it does not adapt, drafts always pay."""
        self._adapts = adapts
        self._loads: dict[int, _Load] = {}

    def follows(self, num_running: int) -> bool:
        """Whether the MTP layers should follow texts while so many run."""
        load = self._load(num_running)
        return not self._adapts or not load.is_measured or load.pays

    def drafts(self, num_running: int) -> bool:
        """Whether the next pass should verify drafts."""
        load = self._load(num_running)
        measuring_without = load.passes_with >= PASSES_WITH and not load.is_measured
        return self.follows(num_running) and not (self._adapts and measuring_without)

    def observe(self, num_running: int, num_drafts: int, num_tokens: int, *, pass_s: float, draft_s: float) -> None:
        """Take the measurements of a pass in which every text only decoded.

        Args:
            num_running: texts in the pass.
            num_drafts: drafts verified in it.
            num_tokens: tokens that came of it.
            pass_s: seconds of the main model and the choice of tokens.
            draft_s: seconds of the MTP modules after it.
        """
        load = self._load(num_running)
        if num_drafts:
            load.with_drafts.append((pass_s + draft_s, num_tokens / num_running))
            load.passes_with += 1
        elif load.passes_with >= PASSES_WITH:
            load.without.append(pass_s)
            load.passes_without += 1
        load.passes += 1
        if load.passes >= ROUND and load.is_measured:
            self._loads[num_running.bit_length()] = _Load()

    def _load(self, num_running: int) -> _Load:
        return self._loads.setdefault(num_running.bit_length(), _Load())
