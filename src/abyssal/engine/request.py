"""What is asked of the engine, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from abyssal.config import ModelConfig
from abyssal.engine.sampler import ScoredToken, TokenConstraint
from abyssal.engine.sampling import SamplingParameters
from abyssal.errors import UsageError

#: Why a sequence ended: a token of the model's, a stop string of the request's, or no room for more tokens.
FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    `num_sequences` follow the prompt, each with random numbers of its own; 0 asks for the prompt's log-probabilities
    alone. `end_ids` end a sequence and are no part of its text; none given, the model's own. `constraint` makes what
    bars tokens, one for each sequence. `wants_experts` asks for the experts behind each token.

    `prompt_logprobs` asks for the log-probability of each prompt token from number `prompt_logprobs_start` on (at least
    1: nothing stands before token 0), and for so many of the likeliest tokens of its place. What stands before that
    token may be shared with other requests; what has to be scored is computed.
    """

    prompt_ids: Sequence[int]
    parameters: SamplingParameters = field(default_factory=SamplingParameters)
    num_sequences: int = 1
    end_ids: frozenset[int] | None = None
    constraint: Callable[[], TokenConstraint] | None = None
    wants_experts: bool = False
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 1


@dataclass(frozen=True, slots=True)
class Output:
    """What one new token adds to a sequence, perhaps no text; the last output of a sequence says why it ended.

    `draft` is what the MTP modules said at the token's place, if anything; `was_draft`: they said the token, so it
    cost no pass of its own. `experts`, if asked for: of the place that said the token, where the one before it went,
    for each layer that has experts, the weightiest first. A sequence that ended by a fault has a last output without a
    token, with the `error`. `prompt_logprobs`, if asked for, come with the first output of a request's first sequence;
    where nothing is generated, it is the only output and has no token.
    """

    request_id: int
    index: int
    token: ScoredToken | None
    text: str = ""
    was_draft: bool = False
    experts: tuple[tuple[int, ...], ...] = ()
    finish_reason: FinishReason | Literal["error"] | None = None
    error: Exception | None = None
    draft: int | None = None
    prompt_logprobs: tuple[ScoredToken, ...] | None = None


def new_token_limit(config: ModelConfig, prompt_tokens: int, max_new_tokens: int) -> int:
    """Return how many tokens can follow a prompt: `max_new_tokens`, or fewer where the context ends before.

    Raises:
        UsageError: the prompt leaves no room for a single one.
    """
    room = config.max_position_embeddings - prompt_tokens
    if room < 1:
        raise UsageError(
            f"prompt: has {prompt_tokens} tokens, but the model can attend to {config.max_position_embeddings}, "
            f"one of them new, so at most {config.max_position_embeddings - 1} are possible; shorten it"
        )
    return min(max_new_tokens, room)
