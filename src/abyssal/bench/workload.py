"""What is asked of a server, and when."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from abyssal.errors import UsageError

#: Short common words, mostly a token each.
_TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its "
    "about than into them can only other time new some could these two may first then do any like my now over such "
    "our man me even most made after also did many off before must well back through years much where your way down "
    "should because long each just state those people too mr how little good world make very year still see own work "
    "men day get here"
)
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True)
class Workload:
    """So many requests, either `concurrency` at a time or `rate` a second at random times (a Poisson process).

    Prompts have about `prompt_tokens` tokens, answers at most `output_tokens`; `spread` makes either vary evenly by
    this share of itself up and down. The first `shared_tokens` of all prompts are the same. Everything random follows
    from `seed`.

    Raises:
        UsageError: a value that cannot be.
    """

    num_requests: int = 64
    rate: float | None = None
    concurrency: int | None = None
    prompt_tokens: int = 128
    output_tokens: int = 64
    shared_tokens: int = 0
    spread: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        if (self.rate is None) == (self.concurrency is None):
            raise UsageError("either a rate or a concurrency must be given")
        rules = (
            ("num_requests", self.num_requests >= 1, "at least 1"),
            ("rate", self.rate is None or 0 < self.rate < float("inf"), "a number above 0, in requests a second"),
            ("concurrency", self.concurrency is None or self.concurrency >= 1, "at least 1"),
            ("prompt_tokens", self.prompt_tokens >= 1, "at least 1"),
            ("output_tokens", self.output_tokens >= 1, "at least 1"),
            ("shared_tokens", 0 <= self.shared_tokens <= self.prompt_tokens, f"from 0 to {self.prompt_tokens}"),
            ("spread", 0 <= self.spread < 1, "at least 0 and below 1"),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise UsageError(f"{name}={getattr(self, name)}: must be {allowed}")

    def arrivals(self) -> list[float]:
        """Return when each request is due, in seconds from the beginning; with a concurrency at once."""
        draw = random.Random(f"arrivals {self.seed}")
        due, times = 0.0, []
        for _ in range(self.num_requests):
            times.append(due)
            due += draw.expovariate(self.rate) if self.rate is not None else 0.0
        return times

    def requests(self, tokens_per_word: float, overhead: float) -> Iterator[tuple[str, int]]:
        """Yield the prompts and the most tokens of their answers.

        Args:
            tokens_a_word: of the server's tokenizer.
            overhead: tokens that the server adds to a prompt.
        """
        draw = random.Random(f"requests {self.seed}")
        shared = draw.choices(WORDS, k=round(self.shared_tokens / tokens_per_word))
        for _ in range(self.num_requests):
            low, high = 1 - self.spread, 1 + self.spread
            tokens = self.prompt_tokens * draw.uniform(low, high) - overhead
            words = max(round(tokens / tokens_per_word), 1)
            own = draw.choices(WORDS, k=max(words - len(shared), 1))
            most = max(round(self.output_tokens * draw.uniform(low, high)), 1)
            yield " ".join([*shared[: words - 1], *own]), most
