"""How much the engine takes on at a time."""

from __future__ import annotations

from dataclasses import dataclass

from abyssal.errors import UsageError


@dataclass(frozen=True)
class EngineOptions:
    """How much the engine takes on at a time.

    `max_step_tokens` tokens and drafts a pass, `max_running` sequences with pages at a time, each of at most
    `max_sequence_tokens` (None: the model's context). The latent cache has at most `cache_bytes` (None: no limit), and
    no more than all of `max_running` sequences could fill, in pages of `page_tokens` tokens. `share_prefixes` lets
    requests that begin alike share pages. `num_drafts` are made for a pass (None: one for each MTP module; 0: none);
    `adapt_drafts` leaves them out at loads where they do not pay.

    Raises:
        UsageError: a number out of its range.
    """

    max_step_tokens: int = 256
    max_running: int = 16
    page_tokens: int = 16
    cache_bytes: int | None = 2**30
    share_prefixes: bool = True
    num_drafts: int | None = None
    adapt_drafts: bool = True
    max_sequence_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check every number."""
        for field in ("max_step_tokens", "max_running", "page_tokens", "cache_bytes", "max_sequence_tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UsageError(f"{field}={value}: must be at least 1")
        if self.max_running > self.max_step_tokens:
            raise UsageError(
                f"max_running={self.max_running}: must be at most max_step_tokens={self.max_step_tokens}, "
                "so that each sequence that runs can have a token a step"
            )
        if self.num_drafts is not None and self.num_drafts < 0:
            raise UsageError(f"num_drafts={self.num_drafts}: must be at least 0; 0 makes none")

    @classmethod
    def single_stream(
        cls, num_drafts: int = 0, *, share_prefixes: bool = False, max_sequence_tokens: int | None = None
    ) -> EngineOptions:
        """Return the options for one sequence at a time, which has the whole machine.

        Prompts take few, long steps, and as many drafts are made as asked for. Where one request may begin like the one
        before, as the turns of a conversation do, pages of one token let it reuse every token that is the same.
        """
        return cls(
            max_step_tokens=512,
            max_running=1,
            page_tokens=1 if share_prefixes else 16,
            cache_bytes=None,
            share_prefixes=share_prefixes,
            num_drafts=num_drafts,
            adapt_drafts=False,
            max_sequence_tokens=max_sequence_tokens,
        )
