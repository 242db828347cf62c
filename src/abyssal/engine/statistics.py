"""What the engine has done and holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DraftStatistics:
    """What became of the drafts: by their place in the pass that verified them, at most `num_drafts` a pass.

    `passes` are those that verify, not those over a prompt, and `tokens` what came of them. A draft is accepted where
    the main model samples the same token and all drafts before it were accepted.
    """

    num_drafts: int
    passes: int = 0
    tokens: int = 0
    drafted: list[int] = field(init=False)
    accepted: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Start the counts by place."""
        self.drafted, self.accepted = [0] * self.num_drafts, [0] * self.num_drafts

    def count_pass(self, drafts: int) -> None:
        """Count a pass that verifies so many drafts."""
        self.passes += 1
        for place in range(drafts):
            self.drafted[place] += 1

    def count_token(self, place: int, *, accepted: bool) -> None:
        """Count a token that came of the pass, at the place of a draft or behind them all."""
        self.tokens += 1
        if accepted:
            self.accepted[place] += 1

    def __str__(self) -> str:
        """Say what became of the drafts, in one line."""
        if not any(self.drafted):
            return "nothing was drafted"
        pairs = list(zip(self.accepted, self.drafted, strict=True))
        places = ", ".join(f"{a}/{d}" for a, d in pairs if d)
        by_place = f" (by place: {places})" if len(pairs) > 1 else ""
        accepted, drafted = sum(self.accepted), sum(self.drafted)
        share = f"{accepted}/{drafted} drafts accepted, {accepted / drafted:.0%}{by_place}"
        return f"{share}; {self.tokens / self.passes:.2f} tokens a pass"


@dataclass(frozen=True)
class EngineStatistics:
    """A snapshot; what `num_..._total` counts only grows.

    `prompt_tokens_total` counts what was looked up in the prefix cache, that is each prompt, and again each text that
    was preempted; `shared_tokens_total` is what of it was found there. `drafted` and `accepted` count by the draft's
    place in its pass.
    """

    num_waiting: int
    num_running: int
    num_pages: int
    num_pages_used: int
    num_pages_cached: int
    prompt_tokens_total: int
    shared_tokens_total: int
    new_tokens_total: int
    preemptions_total: int
    steps_total: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    makes_drafts: bool
