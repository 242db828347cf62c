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

    `temperature` divides the logits, 0 takes the most probable token; `min_p` keeps the tokens at least p times as
    probable as the most probable one, `top_k` then the k most probable (0: all) and `top_p` the smallest set whose
    probability reaches p; one `seed` gives the same tokens each time, none draws a new one; generation ends before the
    first occurrence of a `stop` string.

    Before all that, `logit_bias` is added to the logits of (token, bias) pairs; `repetition_penalty` divides the
    positive logits of the tokens in prompt and text, and multiplies the negative ones; of the text's tokens
    `presence_penalty` is subtracted once and `frequency_penalty` once an occurrence. `top_logprobs` asks for so many of
    the likeliest tokens at each place.

    Raises:
        UsageError: a value out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0

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
            (_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "from 0 to 1; 0 keeps every token"),
            (_finite(self.presence_penalty), "presence_penalty", "a finite number; 0 changes nothing"),
            (_finite(self.frequency_penalty), "frequency_penalty", "a finite number; 0 changes nothing"),
            (
                _finite(self.repetition_penalty) and self.repetition_penalty > 0,
                "repetition_penalty",
                "a finite number above 0; 1 changes nothing",
            ),
            (
                isinstance(self.logit_bias, tuple)
                and all(_whole(token, 0) and _finite(bias) for token, bias in self.logit_bias)
                and len({token for token, _ in self.logit_bias}) == len(self.logit_bias),
                "logit_bias",
                "a tuple of pairs of a token id and a finite number, each id once",
            ),
            (_whole(self.top_logprobs, 0), "top_logprobs", "a whole number, at least 0"),
        ]
        for holds, field, allowed in rules:
            if not holds:
                raise UsageError(f"{field}={getattr(self, field)!r}: must be {allowed}")

    @property
    def changes_logits(self) -> bool:
        """Whether a bias or a penalty is asked for."""
        penalised = self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1
        return penalised or bool(self.logit_bias)

    def generator(self, index: int = 0) -> torch.Generator:
        """Return the source of random numbers of one text, on the CPU whatever the model's device.

        `index` tells the texts of one seed apart; that of 0 is the seed itself.
        """
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed((self.seed + index) % 2**63)
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
    if parameters.min_p:
        probabilities[probabilities < parameters.min_p * probabilities.max()] = 0
        probabilities /= probabilities.sum()
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


def _finite(value: object) -> bool:
    return _number(value) and math.isfinite(value)  # type: ignore[arg-type]
