"""The tokens that each expert gets: from a run's metrics, or from a JSON file."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abyssal.errors import DataError

LOADS, METRICS = "expert_load.jsonl", "metrics.jsonl"
SHAPE = "must be a list of at least one load a layer, or {layer: list}, all layers alike"


@dataclass(frozen=True)
class ExpertLoads:
    """Loads of each expert in each layer, [L][E], the layers' names, and where they are from, as a phrase."""

    layers: tuple[str, ...]
    loads: tuple[tuple[float, ...], ...]
    source: str


def read_loads(path: Path, last_steps: int) -> ExpertLoads:
    """Read expert loads from a run's folder, its `expert_load.jsonl`, or a JSON file.

    Of a run the `expert_load` of the last `last_steps` steps that have one is summed; a line that is still being
    written at the end of the file is left. Runs of an earlier version have it in their `metrics.jsonl`. JSON is a list
    of loads for each layer, or {layer: list of loads}.

    Raises:
        DataError: the file is missing, damaged, or holds no loads.
    """
    if path.is_dir():
        path /= LOADS if (path / LOADS).exists() else METRICS
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{path}: cannot be read ({reason}); give a run's folder or a JSON file of loads") from None
    if path.suffix == ".jsonl":
        return _from_metrics(path, text, last_steps)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error})") from None
    layers, loads = _table(path, value)
    return ExpertLoads(layers, loads, str(path))


def _from_metrics(path: Path, text: str, last_steps: int) -> ExpertLoads:
    """Sum the loads of the last steps of a run."""
    recent: deque[tuple[str, Any]] = deque(maxlen=last_steps)
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break  # the run is writing it
            raise DataError(f"{path}, line {number}: is not JSON") from None
        if isinstance(record, Mapping) and "expert_load" in record:
            recent.append((f"{path}, line {number}", record["expert_load"]))
    if not recent:
        raise DataError(f"{path}: has no expert_load, so the run has not finished a step or its model has no experts")
    tables = [_table(place, value) for place, value in recent]
    layers = tables[0][0]
    for (place, _), (names, rows) in zip(recent, tables, strict=True):
        if names != layers or len(rows[0]) != len(tables[0][1][0]):
            raise DataError(f"{place}: its layers or experts differ from those of the steps before; give fewer steps")
    summed = tuple(
        tuple(math.fsum(column) for column in zip(*rows, strict=True))
        for rows in zip(*(rows for _, rows in tables), strict=True)
    )
    steps = "the last step" if len(tables) == 1 else f"the last {len(tables)} steps"
    return ExpertLoads(layers, summed, f"{steps} of {path}")


def _table(place: object, value: Any) -> tuple[tuple[str, ...], tuple[tuple[float, ...], ...]]:
    """Return layers and loads of what a file holds."""
    if isinstance(value, list):
        value = {str(number): row for number, row in enumerate(value)}
    if not isinstance(value, Mapping) or not value:
        raise DataError(f"{place}: {SHAPE}")
    rows: list[tuple[float, ...]] = []
    for layer, row in value.items():
        if not isinstance(row, list) or not row:
            raise DataError(f"{place}: layer {layer}: {SHAPE}")
        for expert, load in enumerate(row):
            if isinstance(load, bool) or not isinstance(load, int | float) or not 0 <= load < math.inf:
                raise DataError(
                    f"{place}: layer {layer}, expert {expert}: load {load!r} must be a number of at least 0"
                )
        if rows and len(row) != len(rows[0]):
            raise DataError(f"{place}: layer {layer} has {len(row)} experts, the layers before have {len(rows[0])}")
        rows.append(tuple(float(load) for load in row))
    return tuple(value), tuple(rows)
