"""What is asked of the engine, what it keeps of it while it works, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from abyssal.engine.pages import ROOT_HASH
from abyssal.engine.sampler import GeneratedToken, Sampler, TokenConstraint
from abyssal.engine.sampling import SamplingParameters
from abyssal.engine.text_stream import FinishReason, TextStream


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    `num_sequences` texts follow the prompt, each with random numbers of its own. `end_ids` end a text and are no
    part of it; none given, the model's own. `constraint` makes what bars tokens, one for each text. `wants_experts`
    asks for the experts behind each token.
    """

    prompt_ids: Sequence[int]
    parameters: SamplingParameters = field(default_factory=SamplingParameters)
    num_sequences: int = 1
    end_ids: frozenset[int] | None = None
    constraint: Callable[[], TokenConstraint] | None = None
    wants_experts: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """What one new token adds to a text, perhaps nothing; the last output of a text says why it ended.

    `draft` is what the MTP modules said at the token's place, if anything; `was_draft`: they said the token, so it
    cost no pass of its own. `experts`, if asked for: of the place that said the token, where the one before it went,
    for each layer that has experts, the weightiest first. A text that ended by a fault has a last output without a
    token, with the `error`.
    """

    request_id: int
    index: int
    token: GeneratedToken | None
    text: str = ""
    was_draft: bool = False
    experts: tuple[tuple[int, ...], ...] = ()
    finish_reason: FinishReason | Literal["error"] | None = None
    error: Exception | None = None
    draft: int | None = None


@dataclass(eq=False)
class SequenceState:
    """One text that follows a request's prompt: its tokens, what of them is computed, and its pages.

    `num_computed` tokens have their latents in the pages. A step lets it catch up with the tokens and the drafts
    behind them; after a step without drafts left over, all but the newest token are computed.
    """

    request_id: int
    index: int
    tokens: list[int]  # of prompt and text
    max_tokens: int  # of both
    sampler: Sampler
    end_ids: frozenset[int]
    text: TextStream | None
    wants_experts: bool = False
    leader: SequenceState | None = None  # of the same prompt, which computes it for all
    num_computed: int = 0
    drafts: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_cached_pages: int = 0  # full pages that later requests can find
    page_hash: bytes = ROOT_HASH  # of the last of them
    lookahead: int = 0  # tokens behind a page that its content depends on: as many as there are MTP layers
    follows_mtp: bool = False  # by the MTP layers
    num_mtp_computed: int = 0  # entries of the MTP layers, from tokens of the text alone
    mtp_hidden: Tensor | None = None  # [num_computed - num_mtp_computed, D], what their next entries start from
    is_finished: bool = False
    num_prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        """Remember where the prompt ends."""
        self.num_prompt_tokens = len(self.tokens)

    @property
    def num_pending(self) -> int:
        """Tokens and drafts that are not computed."""
        return len(self.tokens) + len(self.drafts) - self.num_computed

    @property
    def num_left(self) -> int:
        """Tokens that may still come."""
        return self.max_tokens - len(self.tokens)

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token, and drafts, are not computed."""
        return self.num_computed >= len(self.tokens) - 1

    @property
    def waits_for_prompt(self) -> bool:
        """Whether another sequence is about to compute the same prompt."""
        leader = self.leader
        return leader is not None and not leader.is_finished and leader.num_computed < leader.num_prompt_tokens

    @property
    def num_complete(self) -> int:
        """Tokens whose latents are final, in the MTP layers too where these followed."""
        return min(self.num_computed, self.num_mtp_computed) if self.lookahead else self.num_computed

    def reset(self) -> None:
        """Forget what is computed; the pages are given back by the caller."""
        self.num_computed = self.num_mtp_computed = 0
        self.drafts, self.pages, self.mtp_hidden, self.follows_mtp = [], [], None, False
        self.num_cached_pages, self.page_hash, self.lookahead = 0, ROOT_HASH, 0
