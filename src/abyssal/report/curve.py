"""What a curve of a page is made of: points, fewer of them where there are too many, and a running mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curve:
    """Measurements of one quantity: where they were taken, in steps and in tokens, and what they gave.

    All three are [N]. A value that is not finite is NaN, which a line leaves out; tokens are NaN where not recorded.
    """

    steps: Values
    tokens: Values
    values: Values

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self.values)

    def along(self, axis: str) -> Values:
        """Return the places on `axis`, which is `tokens` or `steps`."""
        return self.tokens if axis == "tokens" else self.steps


def downsample(x: Values, y: Values, buckets: int) -> tuple[Values, Values]:
    """Return at most two points for each of so many buckets of neighbours: the lowest and the highest, in their order.

    No spike is lost, and no value is made up. A bucket without a finite value keeps one point, so that its gap stays.
    """
    if len(x) <= 2 * buckets:
        return x, y
    kept: list[int] = []
    for part in np.array_split(np.arange(len(x)), buckets):
        finite = part[np.isfinite(y[part])]
        ends = {int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])} if len(finite) else {int(part[0])}
        kept += sorted(ends)
    return x[kept], y[kept]


def running_mean(y: Values, window: int) -> Values:
    """Return, for each point, the mean of the finite values among the last `window`, itself included; else NaN."""
    finite = np.isfinite(y)
    sums = np.cumsum(np.concatenate([[0.0], np.where(finite, y, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], finite]))
    last = np.arange(1, len(y) + 1)
    first = np.maximum(last - window, 0)
    number = counts[last] - counts[first]
    return np.where(number > 0, (sums[last] - sums[first]) / np.maximum(number, 1), np.nan)
