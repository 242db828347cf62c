"""What numbers of ranks and micro-batches a schedule takes, and the sentence where it does not."""

from __future__ import annotations

from typing import NoReturn

from abyssal.errors import UsageError


def check_sizes(ranks: int, micro_batches: int) -> None:
    """Raise UsageError unless both are at least 1."""
    for name, value in (("ranks", ranks), ("micro_batches", micro_batches)):
        if value < 1:
            raise UsageError(f"{name}={value}: must be at least 1")


def refuse_micro_batches(micro_batches: int, rule: str, candidates: tuple[int, ...]) -> NoReturn:
    """Raise UsageError with the rule and, of the valid `candidates`, those above 0."""
    nearest = ", ".join(str(number) for number in candidates if number > 0)
    raise UsageError(f"micro_batches={micro_batches}: {rule}; nearest: {nearest}")
