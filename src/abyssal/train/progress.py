"""Where a run stands: three integers, from which all data order and every schedule follow."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from abyssal.errors import CheckpointError


@dataclass(frozen=True)
class Progress:
    """Steps made, sequences and tokens consumed."""

    step: int = 0
    sequences: int = 0
    tokens: int = 0

    def after(self, sequences: int, sequence_length: int) -> Self:
        """Return the progress one step of `sequences` later."""
        return type(self)(self.step + 1, self.sequences + sequences, self.tokens + sequences * sequence_length)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read the fields back.

        Raises:
            CheckpointError: not what `to_json` writes.
        """
        try:
            return cls(**{name: int(values[name]) for name in ("step", "sequences", "tokens")})
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"progress {values!r}: must hold the integers step, sequences and tokens") from None
