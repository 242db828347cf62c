"""What numbers of ranks and micro-batches a schedule takes, and the sentence where it does not."""

from __future__ import annotations

from typing import NoReturn

from abyssal.errors import UsageError

#: Tables of more chunks than these are a slip of the hand: 16 ranks with 10,000 micro-batches have a third of them.
MAX_CHUNKS = 500_000


def check_sizes(ranks: int, micro_batches: int, stages_per_rank: int = 1) -> None:
    """Raise UsageError unless ranks and micro-batches are at least 1, and the table can be held in memory."""
    for name, value in (("ranks", ranks), ("micro_batches", micro_batches)):
        if value < 1:
            raise UsageError(f"{name}={value}: must be at least 1")
    if (chunks := ranks * stages_per_rank * micro_batches) > MAX_CHUNKS:
        raise UsageError(
            f"ranks={ranks}, micro_batches={micro_batches}: {chunks:,} chunks are more than the {MAX_CHUNKS:,} that a "
            "schedule may have"
        )


def refuse_micro_batches(micro_batches: int, rule: str, candidates: tuple[int, ...]) -> NoReturn:
    """Raise UsageError with the rule and, of the valid `candidates`, those above 0."""
    nearest = ", ".join(str(number) for number in candidates if number > 0)
    raise UsageError(f"micro_batches={micro_batches}: {rule}; nearest: {nearest}")
