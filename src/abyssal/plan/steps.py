"""How many optimizer steps a number of tokens is, with a batch that grows during the run."""

from __future__ import annotations

import math
from collections.abc import Iterator

from abyssal.config import RunConfig


def count_steps(run: RunConfig, tokens: float | None = None) -> int:
    """Return the optimizer steps that see the first `tokens` of the run; without it, the whole run."""
    return sum(steps for _, steps in steps_by_batch_size(run, tokens))


def steps_by_batch_size(run: RunConfig, tokens: float | None = None) -> Iterator[tuple[int, int]]:
    """Yield (sequences a step, so many such steps) for the first `tokens` of the run; without it, the whole run.

    The batch ramp is walked step by step, and what follows it is divided. The last step may reach past the end.
    """
    end = float(run.train.tokens if tokens is None else tokens)
    schedule = run.schedule.batch_size
    unit = run.train.tokens if schedule.unit == "fraction" else 1.0
    ramp_end = min(end, schedule.segments[-1].until * unit if schedule.segments else 0.0)
    seen = 0
    while seen < ramp_end:
        size = run.batch_size_at(seen)
        seen += size * run.train.sequence_length
        yield size, 1
    size = run.batch_size_at(seen)
    rest = math.ceil((end - seen) / (size * run.train.sequence_length))
    if rest > 0:
        yield size, rest
