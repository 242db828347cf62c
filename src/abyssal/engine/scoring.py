"""Log-probabilities of given text: what the model says of a prompt's own tokens.

Legend: T packed tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abyssal.engine.sampler import ScoredToken
from abyssal.model import Transformer

ROWS = 64  # of logits at a time


@dataclass
class PromptScores:
    """The scored tokens of a prompt, from token `start` on, as far as they are computed; each with `top` others."""

    start: int
    top: int
    tokens: list[ScoredToken] = field(default_factory=list)

    @property
    def next_place(self) -> int:
        """The first token that is not scored yet."""
        return self.start + len(self.tokens)


def score_tokens(model: Transformer, hidden: Tensor, following: Sequence[int], top: int) -> list[ScoredToken]:
    """Return what the outputs [T, D] of T places say of the token that follows each, with the `top` likeliest.

    Log-probabilities are differences in float64 of logits and their logsumexp, both in at least fp32; no more than
    `ROWS` rows of logits [V] stand in memory at a time.
    """
    scored: list[ScoredToken] = []
    for rows, ids in zip(hidden.split(ROWS), torch.tensor(following, device=hidden.device).split(ROWS), strict=True):
        logits = model.logits(rows)  # [<=ROWS, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        normalisers = logits.logsumexp(-1, keepdim=True).double()
        logprobs = (logits.gather(-1, ids[:, None]).double() - normalisers)[:, 0].tolist()
        values, likeliest = logits.topk(min(top, logits.shape[-1]), -1)  # [<=ROWS, top]
        pairs = zip(likeliest.tolist(), (values.double() - normalisers).tolist(), strict=True)
        others = [tuple(zip(*row, strict=True)) for row in pairs]
        scored += map(ScoredToken, ids.tolist(), logprobs, others)
    return scored
