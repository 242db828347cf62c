"""Expert load over a run of any length, in a bounded number of time buckets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Letters: L MoE layers, E experts, B time buckets, X columns and Y rows of the picture.


class LoadHistory:
    """The tokens sent to each expert, added up over buckets of equally many steps; not every step need have a load.

    Where there would be too many buckets, neighbours are joined, so memory and the picture stay small however long the
    run.
    """

    def __init__(self, max_buckets: int = 240) -> None:
        """Start empty; `max_buckets` is even."""
        self.layers: tuple[str, ...] = ()
        self._shape: tuple[int, ...] = ()
        self._max_buckets, self._steps_per_bucket = max_buckets, 1
        self._places: dict[int, tuple[float, float]] = {}  # bucket -> (steps, tokens) at its end
        self._sums: dict[int, NDArray[np.float64]] = {}  # bucket -> [L, E]

    def __len__(self) -> int:
        """Return the number of buckets."""
        return len(self._sums)

    def add(self, step: float, tokens: float, load: Any) -> bool:
        """Add the load of one step, {layer: [tokens of each expert]}; returns whether it could be read."""
        table = _table(load)
        if table is None or (self._sums and (tuple(load) != self.layers or table.shape != self._shape)):
            return False
        self.layers, self._shape = tuple(load), table.shape
        while step > self._max_buckets * self._steps_per_bucket:
            self._join_neighbours()
        bucket = max(0, math.ceil(step / self._steps_per_bucket) - 1)
        self._sums[bucket] = self._sums.get(bucket, 0.0) + table
        self._places[bucket] = (step, tokens)
        return True

    def _join_neighbours(self) -> None:
        self._steps_per_bucket *= 2
        self._places = {bucket // 2: place for bucket, place in self._places.items()}
        joined: dict[int, NDArray[np.float64]] = {}
        for bucket, sums in self._sums.items():
            joined[bucket // 2] = joined.get(bucket // 2, 0.0) + sums
        self._sums = joined

    def ends(self, axis: str) -> NDArray[np.float64]:
        """Return where each bucket ends on the axis `tokens` or `steps`, [B]."""
        return np.array([place[axis == "tokens"] for place in self._places.values()], dtype=float)

    def relative(self) -> NDArray[np.float64]:
        """Return each expert's load over the mean of its layer, [B, L, E]; NaN where a layer got no token."""
        sums = np.stack(list(self._sums.values()))
        means = sums.mean(axis=-1, keepdims=True)
        relative: NDArray[np.float64] = np.divide(sums, means, out=np.full_like(sums, np.nan), where=means > 0)
        return relative


def load_image(
    history: LoadHistory, axis: str, columns: int = 240, rows: int = 480
) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Return log2 of the relative load as a picture [Y, X], one band of rows a layer, and the ends of its x axis.

    Columns are equally long on the axis. Where the experts are more than fit into `rows`, neighbours share a row, and
    it shows the one that is furthest from the mean, so that no expert that is left out or overrun disappears.
    """
    relative = history.relative()  # [B, L, E]
    buckets, layers, experts = relative.shape
    with np.errstate(divide="ignore"):
        deviation = np.log2(relative)
    rows_per_layer = min(experts, max(1, rows // layers))
    if rows_per_layer < experts:
        groups = np.array_split(np.arange(experts), rows_per_layer)
        extremes = [np.abs(deviation[..., group]).argmax(axis=-1, keepdims=True) for group in groups]
        chosen = [
            np.take_along_axis(deviation[..., group], extreme, axis=-1)
            for group, extreme in zip(groups, extremes, strict=True)
        ]
        deviation = np.concatenate(chosen, axis=-1)  # [B, L, rows of a layer]
    ends = history.ends(axis)
    begin = max(0.0, ends[0] - (ends[1] - ends[0] if buckets > 1 else ends[0]))
    middles = begin + (ends[-1] - begin) * (np.arange(columns) + 0.5) / columns
    at = np.searchsorted(ends, middles).clip(0, buckets - 1)
    return deviation[at].reshape(columns, layers * rows_per_layer).T, (begin, float(ends[-1]))


def _table(load: Any) -> NDArray[np.float64] | None:
    """Return {layer: [tokens of each expert]} as [L, E], or None where it is anything else."""
    if not isinstance(load, Mapping) or not load or not all(name.isascii() and name.isdecimal() for name in load):
        return None
    try:
        table = np.array(list(load.values()), dtype=float)
    except (TypeError, ValueError, OverflowError):
        return None
    if table.ndim != 2 or 0 in table.shape or not np.isfinite(table).all() or (table < 0).any():
        return None
    return table
