"""Which source each sequence comes from: shares that hold to within one sequence from the start to any point."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import reduce
from hashlib import blake2b
from itertools import accumulate
from math import gcd, lcm

from abyssal.data.order import WindowOrder
from abyssal.errors import ConfigError

#: The longest time after which the draws repeat: the weights' sum, in whole numbers without a common divisor.
LONGEST_PERIOD = 100_000


class Mixture:
    """Draws sources in a fixed rhythm: after n sequences each has been drawn n * its share times, give or take less
    than one.

    The rhythm is Tijdeman's, which keeps every source below that bound at once; it repeats after a period in which
    the shares are whole numbers, so it is a table.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Lay the rhythm out; only the ratios of `weights` matter, which are taken as the decimals they are written.

        Raises:
            ConfigError: the ratios are too fine for a table.
        """
        self.shares = _whole_numbers(weights)
        self.period = sum(self.shares)
        if self.period > LONGEST_PERIOD:
            raise ConfigError(
                f"data.sources: the weights are {':'.join(map(str, self.shares))} "
                f"in whole numbers, whose sum must be at most {LONGEST_PERIOD}; round them"
            )
        self._drawn, self._earlier = _rhythm(self.shares)

    def draw(self, sequence_index: int) -> tuple[int, int]:
        """Return the source of a sequence, and which of that source's draws it is, from 0."""
        periods, place = divmod(sequence_index, self.period)
        source = self._drawn[place]
        return source, periods * self.shares[source] + self._earlier[place]


class MixedOrder(WindowOrder):
    """The order of windows from several sources, which lie one source after another."""

    def __init__(
        self, seed: int, sources: dict[str, int], weights: dict[str, float], skipped: Iterable[tuple[int, int]] = ()
    ) -> None:
        """Fix the order.

        Args:
            seed: of the permutations.
            sources: the windows of each source, by name, in the order in which they lie.
            weights: of each source.
            skipped: ranges [start, stop) of sequence indices that are not to be trained on.
        """
        super().__init__(seed, sum(sources.values()), skipped)
        self._mixture = Mixture([weights[name] for name in sources])
        self._orders = [WindowOrder(_own_seed(seed, name), windows) for name, windows in sources.items()]
        self._first = list(accumulate(sources.values(), initial=0))

    def window(self, sequence_index: int) -> int:
        """Return the window that the sequence is; each source goes through its own epochs."""
        source, draw = self._mixture.draw(sequence_index)
        return self._first[source] + self._orders[source].window(draw)


def _own_seed(seed: int, name: str) -> int:
    return int.from_bytes(blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "big")


def _whole_numbers(weights: Sequence[float]) -> list[int]:
    """Return whole numbers in the same ratios, without a common divisor."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = reduce(lcm, (weight.denominator for weight in exact))
    scaled = [int(weight * scale) for weight in exact]
    divisor = reduce(gcd, scaled)
    return [share // divisor for share in scaled]


def _rhythm(shares: Sequence[int]) -> tuple[array[int], array[int]]:
    """Return, for every place of a period, the source drawn and how often it was before.

    Tijdeman's rule for k sources: of those behind by at least 1/(2k-2) after this place, draw the one that would be
    first to fall behind by 1 - 1/(2k-2). In whole numbers: behind by `lag` / period.
    """
    period, count = sum(shares), len(shares)
    drawn, earlier, draws = array("i"), array("i"), [0] * count
    slack = 2 * count - 2
    for place in range(1, period + 1):
        best, soonest = 0, float("inf")
        for source, share in enumerate(shares if slack else ()):
            lag = place * share - draws[source] * period
            # the borders are exact; only which of two near deadlines is first may be rounded, which harms nothing
            deadline = ((slack - 1) * period - slack * lag) / share
            if slack * lag >= period and deadline < soonest:
                best, soonest = source, deadline
        drawn.append(best)
        earlier.append(draws[best])
        draws[best] += 1
    return drawn, earlier
