"""Quantities that change during a run, as pure functions of the tokens seen. Paper: §4.2."""

from __future__ import annotations

import itertools
import math
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from abyssal.config.frozen import Frozen


class Segment(Frozen):
    """One segment of a schedule, ending at `until` with the value `to`."""

    until: PositiveFloat
    shape: Literal["constant", "linear", "cosine"] = "constant"
    to: NonNegativeFloat | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shape != "constant" and self.to is None:
            raise ValueError(f"to: required, a {self.shape} segment needs the value that it reaches")
        return self


class ValueSchedule(Frozen):
    """A quantity as a piecewise function of the tokens seen, such as the learning rate.

    `start` is the value at zero. A linear or cosine segment moves from the value reached so far to its own `to`;
    a constant one holds `to` (or, without it, the value reached). `unit` says whether `until` counts tokens or is a
    fraction of the run. After the last segment its end value stays.
    """

    start: NonNegativeFloat
    unit: Literal["tokens", "fraction"] = "tokens"
    segments: tuple[Segment, ...] = Field(default=())

    @model_validator(mode="after")
    def _check(self) -> Self:
        ends = [segment.until for segment in self.segments]
        if any(later <= earlier for earlier, later in itertools.pairwise(ends)):
            raise ValueError(f"segments: each `until` must be larger than the one before, but they are {ends}")
        if self.unit == "fraction" and ends and ends[-1] > 1.0:
            raise ValueError(f"segments: until={ends[-1]:g}: must be at most 1, since unit is fraction")
        return self

    @property
    def lowest(self) -> float:
        """The smallest value that the schedule reaches."""
        return min([self.start, *(segment.to for segment in self.segments if segment.to is not None)])

    def at(self, tokens: float, total: float) -> float:
        """Return the value after `tokens` of a run of `total` tokens."""
        x = tokens / total if self.unit == "fraction" else tokens
        begin, value = 0.0, self.start
        for segment in self.segments:
            target = value if segment.to is None else segment.to
            if x < segment.until:
                progress = (x - begin) / (segment.until - begin)
                return {
                    "constant": target,
                    "linear": value + (target - value) * progress,
                    "cosine": target + (value - target) * 0.5 * (1.0 + math.cos(math.pi * progress)),
                }[segment.shape]
            begin, value = segment.until, target
        return value
