"""How one sequence chooses its tokens: the request's changes to the logits, the draw, the log-probabilities.

Legend: V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from abyssal.engine.sampling import SamplingParameters, sample
from abyssal.errors import ModelDirectoryError, UsageError


class TokenConstraint(Protocol):
    """What the next token may be, as a grammar or another rule has it.

    It hears of sampled tokens only, never of drafts, so it needs no way back: a draft is verified by sampling, under
    the mask of its place, what it must agree with. Whatever is raised here ends its sequence, and no other.
    """

    def allowed(self) -> Tensor | None:
        """Return which tokens may come next, [V] bool with at least one; None: all."""
        ...

    def advance(self, token: int) -> None:
        """Take the token that was sampled."""
        ...


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token and its log-probability under the model itself: before the request changes the logits.

    `top` are the likeliest tokens of its place with theirs, where the request asks for some.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws the tokens of one sequence, with random numbers of its own: one for each token, whatever else runs.

    The order: logit bias, repetition penalty, frequency and presence penalty, constraint, then `sample`.
    """

    def __init__(
        self,
        parameters: SamplingParameters,
        prompt_ids: Sequence[int],
        index: int = 0,
        constraint: TokenConstraint | None = None,
    ) -> None:
        """Start behind a prompt; `index` tells the sequences of one request and seed apart."""
        self.parameters, self._constraint = parameters, constraint
        self._generator = parameters.generator(index)
        self._counts: Counter[int] = Counter()  # of new tokens
        self._seen = set(prompt_ids) if parameters.repetition_penalty != 1 else set()

    @property
    def takes_likeliest(self) -> bool:
        """Whether a token is the argmax of the model's own logits, nothing else."""
        return self.parameters.temperature == 0 and self._constraint is None and not self.parameters.changes_logits

    @torch.inference_mode()
    def choose(self, logits: Tensor, normaliser: float | None = None, likeliest: int | None = None) -> ScoredToken:
        """Sample the next token and count it.

        Args:
            logits: [V], not changed; taken in at least fp32.
            normaliser: the logarithm of the sum of their exponentials, where it is known.
            likeliest: their argmax, where it is known.

        Raises:
            ModelDirectoryError: the logits are not finite.
        """
        dtype = logits.dtype
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        if normaliser is None:
            normaliser = float(logits.logsumexp(-1))
        if not math.isfinite(normaliser):
            raise ModelDirectoryError(
                f"the model's logits are not finite (log of their sum: {normaliser}): its weights are damaged, "
                f"or {str(dtype).removeprefix('torch.')} is too narrow for them; try dtype=float32 or another copy"
            )
        if self.takes_likeliest:
            token = int(logits.argmax()) if likeliest is None else likeliest
        else:
            token = sample(self._changed(logits), self.parameters, self._generator)
        self._count(token)
        top: tuple[tuple[int, float], ...] = ()
        if self.parameters.top_logprobs:
            values, ids = logits.topk(min(self.parameters.top_logprobs, len(logits)))
            differences = values.double() - normaliser  # as below, so that a token has one log-probability, not two
            top = tuple(zip(ids.tolist(), differences.tolist(), strict=True))
        return ScoredToken(token, float(logits[token]) - normaliser, top)

    def _changed(self, logits: Tensor) -> Tensor:
        """Return the logits with everything the request adds to them."""
        p = self.parameters
        mask = None if self._constraint is None else self._constraint.allowed()
        if not p.changes_logits and mask is None:
            return logits
        logits = logits.clone()
        if p.logit_bias:
            ids, bias = zip(*p.logit_bias, strict=True)
            logits[list(ids)] += torch.tensor(bias, dtype=logits.dtype, device=logits.device)
        if p.repetition_penalty != 1 and self._seen:
            seen = torch.tensor(sorted(self._seen), device=logits.device)
            values = logits[seen]
            logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if self._counts and (p.frequency_penalty or p.presence_penalty):
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype, device=logits.device)
            logits[list(self._counts)] -= p.frequency_penalty * counts + p.presence_penalty
        if mask is not None:
            if not bool(mask.any()):
                raise UsageError("constraint: allows no token, so nothing can follow")
            logits.masked_fill_(~mask.to(logits.device), -math.inf)
        return logits

    def _count(self, token: int) -> None:
        p = self.parameters
        if p.frequency_penalty or p.presence_penalty:
            self._counts[token] += 1
        if p.repetition_penalty != 1:
            self._seen.add(token)
        if self._constraint is not None:
            self._constraint.advance(token)
