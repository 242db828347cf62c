"""The order of training, as a pure function of seed and sequence index: its whole state is an integer."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from hashlib import blake2b
from math import isqrt
from typing import Self

from abyssal.errors import UsageError

#: Ranges [start, stop) of sequence indices, sorted, none of which touch.
Ranges = tuple[tuple[int, int], ...]
#: Feistel rounds. Four make a permutation of many windows look random (Luby and Rackoff); two more help the few.
ROUNDS = 6


class WindowOrder:
    """Which window of the training stream each sequence of the run is.

    In every epoch each of the `windows` windows comes once, in an order of its own. The permutation is computed, not
    stored: a Feistel network over pairs of digits to the base ceil(sqrt(windows)), entered again until the result is a
    window (cycle walking): on average at most once more, and with many windows hardly ever.
    """

    def __init__(self, seed: int, windows: int, skipped: Iterable[tuple[int, int]] = ()) -> None:
        """Fix the order.

        Args:
            seed: of the permutations.
            windows: of the training stream, at least 1.
            skipped: ranges [start, stop) of sequence indices that are not to be trained on.

        Raises:
            UsageError: there are no windows, or a skipped range is empty or starts below zero.
        """
        if windows < 1:
            raise UsageError(f"windows={windows}: must be at least 1")
        self.seed = seed
        self.windows = windows
        self.skipped = _checked(skipped)
        self._base = isqrt(windows - 1) + 1  # ceil of the square root

    def skipping(self, ranges: Iterable[tuple[int, int]]) -> Self:
        """Return the same order with `ranges` skipped, whatever this one skips; what it is computed from is shared."""
        order = copy(self)
        order.skipped = _checked(ranges)
        return order

    def effective(self, n: int) -> int:
        """Return the sequence index of the n-th sequence to train on, from 0: past the skipped ranges."""
        for start, stop in self.skipped:
            if n < start:
                break
            n += stop - start
        return n

    def ranges(self, first: int, count: int) -> Ranges:
        """Return the sequence indices of the `count` sequences to train on from the `first`-th on, as ranges."""
        return merged((index, index + 1) for index in map(self.effective, range(first, first + count)))

    def window(self, sequence_index: int) -> int:
        """Return the window that the sequence is."""
        epoch, place = divmod(sequence_index, self.windows)
        place = self._permute(place, epoch)
        while place >= self.windows:
            place = self._permute(place, epoch)
        return place

    def _permute(self, place: int, epoch: int) -> int:
        """Return where the permutation of this epoch takes `place`, both below base**2."""
        left, right = divmod(place, self._base)
        for round_ in range(ROUNDS):
            message = f"{self.seed}:{epoch}:{round_}:{right}".encode()
            key = int.from_bytes(blake2b(message, digest_size=8).digest(), "big")
            left, right = right, (left + key) % self._base
        return left * self._base + right


def _checked(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return ranges as `Ranges`.

    Raises:
        UsageError: one is empty or starts below zero.
    """
    for start, stop in (ranges := sorted(ranges)):
        if not 0 <= start < stop:
            raise UsageError(f"skipped=({start}, {stop}): must be a range with 0 <= start < stop")
    return merged(ranges)


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return sorted ranges with those that touch or overlap made one."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)
