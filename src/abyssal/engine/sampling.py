"""How the next token is chosen from the logits.

Legend: V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.errors import UsageError


@dataclass(frozen=True)
class SamplingParameters:
    """What a request asks for. The defaults are those DeepSeek gives for its chat models.

    `temperature` divides the logits, 0 takes the most probable token; `top_k` keeps the k most probable tokens (0: all)
    and `top_p` then the smallest set whose probability reaches p; one `seed` gives the same tokens each time, none
    draws a new one; generation ends before the first occurrence of a `stop` string.

    Raises:
        UsageError: a value out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every field."""
        rules = [
            (_whole(self.max_new_tokens, 1), "max_new_tokens", "a whole number, at least 1"),
            (
                _number(self.temperature) and 0 <= self.temperature < math.inf,
                "temperature",
                "a number of at least 0; 0 takes the most probable token",
            ),
            (
                _number(self.top_p) and 0 < self.top_p <= 1,
                "top_p",
                "above 0 and at most 1; 1 keeps every token",
            ),
            (_whole(self.top_k, 0), "top_k", "a whole number, at least 0; 0 keeps every token"),
            (
                self.seed is None or (_whole(self.seed, 0) and self.seed < 2**63),
                "seed",
                "a whole number from 0 to 2^63 - 1, or not given",
            ),
            (
                isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop),
                "stop",
                "a tuple of strings, none of them empty",
            ),
        ]
        for holds, field, allowed in rules:
            if not holds:
                raise UsageError(f"{field}={getattr(self, field)!r}: must be {allowed}")

    def generator(self) -> torch.Generator:
        """Return the source of random numbers of one request, on the CPU whatever the model's device."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(logits: Tensor, parameters: SamplingParameters, generator: torch.Generator) -> int:
    """Choose a token.

    Args:
        logits: [V], any dtype and device; -inf bars a token. The softmax is taken in float64.
        parameters: see there. Of equally probable tokens the one with the lower id is kept first.
        generator: on the CPU; one number is drawn from it, none at temperature 0.

    Returns:
        The token's id.
    """
    if parameters.temperature == 0:
        return int(logits.argmax())
    wide = logits.to("cpu", torch.float64)
    scaled = (wide - wide.max()) / parameters.temperature  # the difference first: no temperature makes it overflow
    probabilities = scaled.softmax(-1)  # [V]
    top_k, top_p = parameters.top_k, parameters.top_p
    if 0 < top_k < len(probabilities):
        ranked, order = probabilities.sort(descending=True, stable=True)
        ranked, ids = ranked[:top_k] / ranked[:top_k].sum(), order[:top_k]
    elif top_p < 1:
        # All tokens rarer than this cannot make up 1 - p together, so none is in the set: there is less to sort.
        common = (probabilities >= (1 - top_p) / len(probabilities)).nonzero()[:, 0]
        ranked, order = probabilities[common].sort(descending=True, stable=True)
        ids = common[order]
    else:
        return _draw(probabilities, generator)
    if top_p < 1:
        short = int((ranked.cumsum(-1) < top_p).sum())  # tokens with which p is not reached yet
        ranked = ranked[: short + 1]
    return int(ids[_draw(ranked, generator)])


def _draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """Return an index, drawn in proportion to `probabilities`, whose sum need not be 1.

    By the inverse of their cumulative sum: `torch.multinomial` draws a number for every entry.
    """
    mass = probabilities.cumsum(-1)
    point = torch.rand(1, dtype=mass.dtype, generator=generator) * mass[-1]
    last = torch.searchsorted(mass, mass[-1:])  # rounding can reach the end, where barred tokens may stand
    return min(int(torch.searchsorted(mass, point, right=True)), int(last))


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
