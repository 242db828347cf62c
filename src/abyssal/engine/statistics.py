"""What the engine has done and holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


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
