"""Turns the fields of a request into the engine's sampling parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from abyssal.engine import SamplingParameters
from abyssal.server.faults import ApiError
from abyssal.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest

#: Fields with the names and meanings of the engine's.
SHARED_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
SEEDS = 2**63


def sampling_parameters(body: GenerationRequest, defaults: SamplingParameters, num_free: int) -> SamplingParameters:
    """Return what a request asks for, with the model's own values where it asks for nothing.

    Args:
        body: the request.
        defaults: of the model directory.
        num_free: tokens that fit behind the prompt; a request without a limit gets all of them.

    Raises:
        ApiError: more tokens than fit, or a field that cannot be.
        UsageError: a field that cannot be.
    """
    fields: dict[str, Any] = {name: value for name in SHARED_FIELDS if (value := getattr(body, name)) is not None}
    fields["max_new_tokens"] = _limit(body, num_free)
    if body.seed is not None:
        fields["seed"] = body.seed % SEEDS
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if not all(stop):
        raise ApiError(400, "stop: must not hold an empty string", param="stop")
    bias = tuple((_token(key), float(value)) for key, value in (body.logit_bias or {}).items())
    return replace(defaults, stop=tuple(stop), logit_bias=bias, top_logprobs=_num_logprobs(body), **fields)


def _limit(body: GenerationRequest, num_free: int) -> int:
    """Return the most tokens that a text may have."""
    name, requested = "max_tokens", body.max_tokens
    if isinstance(body, ChatCompletionRequest) and body.max_completion_tokens is not None:
        name, requested = "max_completion_tokens", body.max_completion_tokens
    if requested is None:
        return min(16, num_free) if isinstance(body, CompletionRequest) else num_free
    if requested > num_free:
        raise ApiError(
            400,
            f"{name}={requested}: only {num_free} tokens fit behind this prompt; ask for fewer or shorten the prompt",
            param=name,
            code="context_length_exceeded",
        )
    return requested


def _token(key: str) -> int:
    """Return the token id that a key of `logit_bias` spells."""
    if not (key.isascii() and key.isdigit() and len(key) < 12):
        raise ApiError(400, f"logit_bias: {key[:40]!r} is not a token id", param="logit_bias")
    return int(key)


def _num_logprobs(body: GenerationRequest) -> int:
    """Return how many alternatives of each token a request wants to see."""
    if isinstance(body, CompletionRequest):
        return body.logprobs or 0
    assert isinstance(body, ChatCompletionRequest)
    return body.top_logprobs or 0
