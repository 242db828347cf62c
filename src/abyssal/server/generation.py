"""The generation of one request: its streams, its usage, and how they are freed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from abyssal.engine import AsyncEngine, Output, OutputStream, Request
from abyssal.errors import AbyssalError
from abyssal.server.faults import fault_of
from abyssal.server.metrics import RequestTimer, ServerMetrics


@dataclass
class Usage:
    """Tokens of a request so far."""

    prompt_tokens: int
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    accepted_drafts: int = 0
    rejected_drafts: int = 0

    def count(self, output: Output) -> None:
        """Count one output."""
        if output.token is None:
            return
        self.completion_tokens += 1
        self.accepted_drafts += output.was_draft
        self.rejected_drafts += output.draft is not None and not output.was_draft

    def as_json(self) -> dict[str, Any]:
        """Return OpenAI's `usage`; predictions are the drafts of the MTP modules."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning_tokens,
                "accepted_prediction_tokens": self.accepted_drafts,
                "rejected_prediction_tokens": self.rejected_drafts,
            },
        }


@dataclass
class Generation:
    """The outputs of one or several prompts, as (number of the text, output)."""

    streams: Sequence[OutputStream]
    texts_each: int
    usage: Usage
    timer: RequestTimer

    @classmethod
    async def start(cls, driver: AsyncEngine, requests: Sequence[Request], metrics: ServerMetrics) -> Generation:
        """Queue the requests, all of them or none.

        Raises:
            AbyssalError: the engine refuses one.
        """
        streams: list[OutputStream] = []
        try:
            for request in requests:
                streams.append(driver.submit(request))
        except BaseException:
            for stream in streams:
                await stream.aclose()
            raise
        usage, texts_each = Usage(sum(len(request.prompt_ids) for request in requests)), requests[0].num_sequences
        return cls(streams, texts_each, usage, metrics.timer(usage.prompt_tokens, texts_each * len(streams)))

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Yield the outputs as (number of the text, output).

        The texts of one prompt come mixed as they grow, those of the next prompt behind them; all grow at once.

        Raises:
            ApiError: the request ended by a fault.
        """
        try:
            for number, stream in enumerate(self.streams):
                async for output in stream:
                    self.usage.count(output)
                    self.timer.observe(output)
                    yield number * self.texts_each + output.index, output
        except AbyssalError as error:
            self.timer.fail()
            raise fault_of(error) from error

    async def aclose(self) -> None:
        """Free what has not ended; to be called once, whatever happened."""
        self.timer.end()
        for stream in self.streams:
            await stream.aclose()
