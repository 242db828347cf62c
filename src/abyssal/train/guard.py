"""Which updates are refused, and when a run goes back: a pure function of the steps before.

A refused batch counts as never drawn: neither weights, moments, biases nor the counts of steps and tokens know of it,
and its sequences join the skipped ranges of the data order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from abyssal.config.run import GuardConfig
from abyssal.data.order import Ranges, merged
from abyssal.errors import CheckpointError

#: The median of the absolute deviations of normal numbers, times this, is their standard deviation.
MAD_TO_SIGMA = 1.4826
#: Sigma is taken as at least this part of the median, so that a run of nearly equal values does not refuse the next.
LEAST_SIGMA = 0.02


def non_finite(loss: float, gradient_norm: float) -> str | None:
    """Return what is wrong with a step whose loss or gradient norm is not finite, none where both are."""
    for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
        if not math.isfinite(value):
            return f"the {name} is {value}, which is not finite"
    return None


def upper_bound(accepted: Sequence[float], sigmas: float) -> float:
    """Return median + sigmas * sigma, sigma from the median absolute deviation (at least 2% of the median)."""
    median = statistics.median(accepted)
    deviation = statistics.median(abs(value - median) for value in accepted)
    return median + sigmas * max(MAD_TO_SIGMA * deviation, LEAST_SIGMA * median)


@dataclass(frozen=True)
class Refusal:
    """One refused batch: the step it was drawn for, and its sequences of the data order."""

    step: int
    start: int  # the first sequence index
    stop: int  # behind the last


@dataclass(frozen=True)
class Guard:
    """What the guard remembers, a part of the training state. Losses and norms are those of accepted steps."""

    losses: tuple[float, ...] = ()
    gradient_norms: tuple[float, ...] = ()
    refusals: tuple[Refusal, ...] = ()  # of the last `rollback_steps` steps
    skipped: Ranges = ()  # [start, stop) of sequence indices that are never trained on
    rollbacks: tuple[int, ...] = ()  # the step of each training state that the run went back to

    def judge(self, config: GuardConfig, loss: float, gradient_norm: float) -> str | None:
        """Return why the update of this step is to be refused, none where it is not."""
        if reason := non_finite(loss, gradient_norm):
            return reason
        if len(self.losses) < config.min_steps:
            return None
        for name, value, accepted in (
            ("loss", loss, self.losses),
            ("gradient norm", gradient_norm, self.gradient_norms),
        ):
            bound = upper_bound(accepted, config.sigmas)
            if value > bound:
                return f"the {name} is {value:.4g}, above {bound:.4g}, the bound of the last {len(accepted)} steps"
        return None

    def accepting(self, config: GuardConfig, loss: float, gradient_norm: float) -> Self:
        """Return the guard after an accepted step; the oldest beyond `window_steps` is forgotten."""
        losses, norms = (*self.losses, loss), (*self.gradient_norms, gradient_norm)
        return replace(self, losses=losses[-config.window_steps :], gradient_norms=norms[-config.window_steps :])

    def refusing(self, config: GuardConfig, step: int, ranges: Ranges) -> Self:
        """Return the guard after the batch of `ranges`, drawn for `step`, was refused."""
        recent = tuple(refusal for refusal in self.refusals if refusal.step > step - config.rollback_steps)
        refusal = Refusal(step, ranges[0][0], ranges[-1][1])
        return replace(self, refusals=(*recent, refusal), skipped=merged(sorted((*self.skipped, *ranges))))

    def in_trouble(self, config: GuardConfig) -> bool:
        """Whether so many of the last steps were refused that single batches are not to blame."""
        return len(self.refusals) >= config.rollback_refusals

    def rolled_back(self, before: Self, step: int, next_sequence: int) -> Self:
        """Return the guard with which the run goes on from the training state of `step`, which held the guard `before`.

        Stepped over is everything from the first to the last refused sequence, accepted batches between them included,
        since they are suspect. A second time at the same training state: everything from `next_sequence`, the first
        sequence index after that state.
        """
        start = next_sequence if step in self.rollbacks else max(next_sequence, self.refusals[0].start)
        range_ = (start, self.refusals[-1].stop)
        return replace(
            before, skipped=merged(sorted((*self.skipped, range_))), rollbacks=(*self.rollbacks, step), refusals=()
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Read the fields back.

        Raises:
            CheckpointError: not what `to_json` writes.
        """
        try:
            return cls(
                losses=tuple(map(float, values["losses"])),
                gradient_norms=tuple(map(float, values["gradient_norms"])),
                refusals=tuple(Refusal(**refusal) for refusal in values["refusals"]),
                skipped=tuple((int(start), int(stop)) for start, stop in values["skipped"]),
                rollbacks=tuple(map(int, values["rollbacks"])),
            )
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"guard {values!r}: is not what a training state holds") from None
