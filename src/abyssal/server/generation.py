"""One request while it is answered: its texts, counted, and freed whichever way it ends."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from abyssal.engine import AsyncEngine, Output, Request, Stream
from abyssal.server.faults import fault_of
from abyssal.server.metrics import Metrics


@dataclass
class Usage:
    """Tokens of a request so far."""

    prompt_tokens: int
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    accepted_drafts: int = 0
    rejected_drafts: int = 0

    def count(self, output: Output) -> None:
        """Count what one output says."""
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

    streams: Sequence[Stream]
    texts_each: int
    usage: Usage
    metrics: Metrics

    @classmethod
    async def start(cls, driver: AsyncEngine, requests: Sequence[Request], metrics: Metrics) -> Generation:
        """Queue the requests, all of them or none.

        Raises:
            AbyssalError: the engine refuses one.
        """
        streams: list[Stream] = []
        try:
            for request in requests:
                streams.append(driver.submit(request))
        except BaseException:
            for stream in streams:
                await stream.aclose()
            raise
        usage = Usage(sum(len(request.prompt_ids) for request in requests))
        return cls(streams, requests[0].num_continuations, usage, metrics)

    async def outputs(self) -> AsyncGenerator[tuple[int, Output]]:
        """Yield what comes of the texts as (number, output); closing this, or an error, frees what has not ended.

        The texts of one prompt come mixed as they grow, those of the next prompt behind them; all grow at once.

        Raises:
            ApiError: the request ended by a fault.
        """
        timer = self.metrics.timer(self.usage.prompt_tokens, self.texts_each * len(self.streams))
        try:
            for number, stream in enumerate(self.streams):
                async for output in stream:
                    self.usage.count(output)
                    timer.observe(output)
                    yield number * self.texts_each + output.index, output
        except Exception as error:
            timer.fails()
            raise fault_of(error) from error
        finally:
            timer.end()
            for stream in self.streams:
                await stream.aclose()
