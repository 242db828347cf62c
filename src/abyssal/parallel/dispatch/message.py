"""What a row is sent in.

Legend: S rows, D hidden.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Encoding(Protocol):
    """Rows into what travels, and back."""

    def encode(self, rows: Tensor) -> Tensor:
        """Return the message of rows [S, D], a row each."""
        ...

    def decode(self, message: Tensor) -> Tensor:
        """Return the rows of a message: [S, D]."""
        ...


class Plain:
    """Rows as they are."""

    def encode(self, rows: Tensor) -> Tensor:
        """Return them."""
        return rows

    def decode(self, message: Tensor) -> Tensor:
        """Return them."""
        return message
