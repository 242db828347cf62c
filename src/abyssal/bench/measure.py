"""Runs a workload against a server, and summarises the measurement."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from abyssal.bench.client import Client, RequestResult
from abyssal.bench.workload import WORDS, Workload

QUANTILES = (50, 90, 95, 99)
#: Words whose tokens the server is asked for, to find how many tokens it makes of a word.
FEW, MANY = 20, 100
TOKENS_PER_WORD = 1.3  # where it does not tell


@dataclass(frozen=True)
class Distribution:
    """Mean, percentiles and maximum of a quantity."""

    count: int
    mean: float
    quantiles: dict[int, float]
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """Summarise values; None where there are none."""
        if not values:
            return None
        quantiles = np.percentile(values, QUANTILES).tolist()
        return cls(len(values), float(np.mean(values)), dict(zip(QUANTILES, quantiles, strict=True)), max(values))


@dataclass(frozen=True)
class ServingResult:
    """The measurement of a server, one entry a request."""

    measured: list[RequestResult]
    seconds: float  # until the last one ended

    @property
    def succeeded(self) -> list[RequestResult]:
        """Requests that ended without an error."""
        return [one for one in self.measured if one.error is None]

    def samples(self) -> dict[str, list[float]]:
        """Return every quantity's values [s], by name.

        `ttft`: from when a request was due to its first text; `tpot`: from there to its last one, over the tokens after
        the first; `itl`: between one piece of text and the next; `latency`: from when it was due to its end.
        """
        succeeded = self.succeeded
        return {
            "ttft": [one.chunks_s[0] - one.due_s for one in succeeded if one.chunks_s],
            "tpot": [
                (one.chunks_s[-1] - one.chunks_s[0]) / (one.tokens - 1)
                for one in succeeded
                if one.tokens > 1 and len(one.chunks_s) > 1
            ],
            "itl": [after - before for one in succeeded for before, after in pairwise(one.chunks_s)],
            "latency": [one.ended_s - one.due_s for one in succeeded],
        }

    def distributions(self) -> dict[str, Distribution]:
        """Summarise each quantity that has values."""
        return {name: d for name, values in self.samples().items() if (d := Distribution.of(values)) is not None}

    def errors(self) -> dict[str, int]:
        """Count the failures by what they said, the most frequent first."""
        return dict(Counter(one.error for one in self.measured if one.error is not None).most_common())

    def acceptance(self) -> float | None:
        """Return the share of drafted tokens that were accepted, where the server tells."""
        accepted = sum(one.accepted_drafts or 0 for one in self.succeeded)
        drafted = accepted + sum(one.rejected_drafts or 0 for one in self.succeeded)
        return accepted / drafted if drafted else None

    def totals(self) -> dict[str, Any]:
        """Return counts and rates over the whole measurement."""
        succeeded = self.succeeded
        output = sum(one.tokens for one in succeeded)
        counted = all(one.prompt_tokens is not None for one in succeeded)
        prompt = sum(one.prompt_tokens or 0 for one in succeeded) if counted else None
        return {
            "requests": len(self.measured),
            "failed": len(self.measured) - len(succeeded),
            "seconds": self.seconds,
            "requests_per_s": len(succeeded) / self.seconds,
            "prompt_tokens": prompt,
            "output_tokens": output,
            "output_tokens_per_s": output / self.seconds,
            "acceptance": self.acceptance(),
        }


async def calibrate(client: Client) -> tuple[float, float, bool]:
    """Return tokens a word and tokens that a prompt has beside its words, and whether the server told.

    Raises:
        ServerError: a request fails.
    """
    few, many = [await client.count_prompt(" ".join(WORDS[:count])) for count in (FEW, MANY)]
    if few is None or many is None or many <= few:
        return TOKENS_PER_WORD, 0.0, False
    rate = (many - few) / (MANY - FEW)
    return rate, max(few - FEW * rate, 0.0), True


async def measure(
    client: Client,
    workload: Workload,
    words: tuple[float, float],
    on_end: Callable[[RequestResult], None] = lambda _: None,
) -> ServingResult:
    """Send the requests of a workload when they are due, and return what became of them.

    Args:
        client: of the server.
        workload: how many, when, how long.
        words: tokens a word and a prompt's further tokens, as `calibrate` finds.
        on_end: called with each request that has ended.
    """
    prompts = list(workload.requests(*words))
    arrivals = workload.arrivals()
    places = asyncio.Semaphore(workload.concurrency or workload.num_requests)
    results = [RequestResult(due) for due in arrivals]
    begin = time.perf_counter()

    async def one(number: int) -> None:
        measured = results[number]
        await asyncio.sleep(max(arrivals[number] - (time.perf_counter() - begin), 0))
        async with places:
            if workload.rate is None:  # the next one is due when there is a place
                measured.due_s = time.perf_counter() - begin
            await client.ask(*prompts[number], measured, begin)
        on_end(measured)

    async with asyncio.TaskGroup() as group:
        for number in range(len(prompts)):
            group.create_task(one(number))
    return ServingResult(results, max(measured.ended_s for measured in results))
