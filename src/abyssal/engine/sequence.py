"""What the engine keeps of one sequence while it works on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from abyssal.engine.detokenizer import Detokenizer
from abyssal.engine.pages import ROOT_HASH
from abyssal.engine.sampler import Sampler
from abyssal.engine.scoring import PromptScores


@dataclass(eq=False)
class SequenceState:
    """A prompt and what follows it: its tokens, what of them is computed, and its pages.

    `num_computed` tokens have their latents in the pages. A step lets it catch up with the tokens and the drafts
    behind them; after a step without drafts left over, all but the newest token are computed.
    """

    request_id: int
    index: int
    tokens: list[int]  # of the prompt and behind it
    max_tokens: int  # of both
    sampler: Sampler
    end_ids: frozenset[int]
    detokenizer: Detokenizer | None
    wants_experts: bool = False
    scores: PromptScores | None = None  # where the prompt's log-probabilities are asked for
    leader: SequenceState | None = None  # of the same prompt, which computes it for all
    num_computed: int = 0
    drafts: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_cached_pages: int = 0  # full pages that later requests can find
    page_hash: bytes = ROOT_HASH  # of the last of them
    lookahead: int = 0  # tokens behind a page that its content depends on: as many as there are MTP layers
    follows_mtp: bool = False  # whether the MTP layers have their entries for it, so that they can draft
    num_mtp_computed: int = 0  # entries of the MTP layers, from tokens of the sequence alone
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
    def num_new(self) -> int:
        """Tokens behind the prompt."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_left(self) -> int:
        """Tokens that may still come."""
        return self.max_tokens - len(self.tokens)

    @property
    def generates(self) -> bool:
        """Whether anything is to follow the prompt."""
        return self.max_tokens > self.num_prompt_tokens

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
    def num_shareable(self) -> int:
        """Tokens that need not be computed here if a page has them: what has to be scored needs the outputs."""
        scores = self.scores
        if scores is None or scores.next_place >= self.num_prompt_tokens:
            return len(self.tokens)
        return scores.next_place - 1

    @property
    def num_complete(self) -> int:
        """Tokens whose latents are final, in the MTP layers too where these followed."""
        return min(self.num_computed, self.num_mtp_computed) if self.lookahead else self.num_computed

    def reset(self) -> None:
        """Forget what is computed; the pages are given back by the caller."""
        self.num_computed = self.num_mtp_computed = 0
        self.drafts, self.pages, self.mtp_hidden, self.follows_mtp = [], [], None, False
        self.num_cached_pages, self.page_hash, self.lookahead = 0, ROOT_HASH, 0
