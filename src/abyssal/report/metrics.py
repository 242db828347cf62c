"""metrics.jsonl and the expert loads beside it, read as far as they can be read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from abyssal.report.curve import Curve
from abyssal.report.expert_load import LoadHistory

LOADS = "expert_load.jsonl"
#: Which fields become curves. `mtp_losses` holds one value a module; they become mtp_losses.1, mtp_losses.2, ...
FIELDS = (
    "loss",
    "balance_loss",
    "gradient_norm",
    "learning_rate",
    "max_violation",
    "tokens_per_s",
    "mfu",
    "validation_bits_per_byte",
    "validation_ema_bits_per_byte",
    "validation_loss",
)
#: A record with one of these is of no step, but of a batch that was not trained on, or of a range that is stepped over.
SKIPPING = ("skipped", "refused", "rolled_back_from")


@dataclass(frozen=True)
class SkippedBatch:
    """A batch that was not trained on: the step it was met at, and what its record says, as (field, text)."""

    step: int
    tokens: float
    facts: tuple[tuple[str, str], ...]

    def place(self, axis: str) -> float | None:
        """Return where it stands on `axis`, `tokens` or `steps`; None where that was not recorded."""
        place = self.tokens if axis == "tokens" else float(self.step)
        return place if math.isfinite(place) else None


@dataclass(frozen=True)
class RunMetrics:
    """The curves of a run by field, its expert load, the batches it skipped, and what could not be read."""

    curves: dict[str, Curve] = field(default_factory=dict)
    loads: LoadHistory = field(default_factory=LoadHistory)
    skipped: tuple[SkippedBatch, ...] = ()
    steps: int = 0
    tokens: float = math.nan
    notes: tuple[str, ...] = ()

    def last(self, name: str) -> float | None:
        """Return the last finite value of a field, or None where there is none."""
        values = self.curves[name].values if name in self.curves else np.empty(0)
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else None

    def training_time_s(self) -> float | None:
        """Return the time of the training steps, without validation and checkpoints, from the measured rates [s]."""
        if "tokens_per_s" not in self.curves:
            return None
        rates = self.curves["tokens_per_s"]
        since = np.diff(rates.tokens, prepend=0.0)
        usable = np.isfinite(since) & (rates.values > 0)
        return float((since[usable] / rates.values[usable]).sum()) if usable.any() else None

    def tokens_timed(self) -> float:
        """Return the tokens that `training_time_s` covers."""
        places = self.curves["tokens_per_s"].tokens if "tokens_per_s" in self.curves else np.empty(0)
        return float(places[np.isfinite(places)].max(initial=0.0))

    def mean_mfu(self) -> float | None:
        """Return the mean MFU, weighed by the tokens of each measurement."""
        if "mfu" not in self.curves:
            return None
        mfu = self.curves["mfu"]
        since = np.diff(mfu.tokens, prepend=0.0)
        usable = np.isfinite(since) & (since > 0) & np.isfinite(mfu.values)
        return float(np.average(mfu.values[usable], weights=since[usable])) if usable.any() else None


def read_metrics(path: Path) -> RunMetrics:
    """Read the metrics of a run; what is damaged or missing becomes a note, never a fault."""
    reader = _MetricsReader()
    if not path.exists():
        return RunMetrics(notes=(f"There is no {path.name} yet.",))
    for file, add in ((path, reader.add), (path.with_name(LOADS), reader.add_load)):
        try:
            with file.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    add(line)
        except FileNotFoundError:
            pass  # a model without experts has no loads
        except OSError as error:
            reader.notes.append(f"{file.name} cannot be read further ({error.strerror or error}).")
    return reader.metrics(path.name)


class _MetricsReader:
    """Takes the lines of metrics.jsonl one after another."""

    def __init__(self) -> None:
        self.points: dict[str, list[tuple[float, float, float]]] = {}
        self.loads = LoadHistory()
        self.skipped: list[SkippedBatch] = []
        self.notes: list[str] = []
        self.steps, self.tokens = 0, math.nan
        self.unreadable_lines = self.unreadable_loads = 0

    def add(self, line: str) -> None:
        """Take one line in, or count it as unreadable."""
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            self.unreadable_lines += bool(line.strip())
            return
        tokens = _number(record.get("tokens"))
        if any(record.get(name) not in (None, False) for name in SKIPPING):
            self.skipped.append(SkippedBatch(step, tokens, tuple(_facts(record))))
            return  # an outlier that was kept away from the weights is kept away from the curves as well
        self.steps = max(self.steps, step)
        self.tokens = tokens
        for name, value in _values(record):
            self.points.setdefault(name, []).append((step, tokens, value))
        self._add_load(step, tokens, record)  # of a run whose metrics hold the loads too

    def add_load(self, line: str) -> None:
        """Take one line of the expert loads in, or count it as unreadable."""
        if not line.strip():
            return
        try:
            record = json.loads(line)
            self._add_load(int(record["step"]), _number(record.get("tokens")), record)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            self.unreadable_loads += 1

    def _add_load(self, step: int, tokens: float, record: dict[str, Any]) -> None:
        if "expert_load" in record:
            self.unreadable_loads += not self.loads.add(step, tokens, record["expert_load"])

    def metrics(self, name: str) -> RunMetrics:
        """Return what was read from the file of that name."""
        if self.unreadable_lines:
            lines = "1 line" if self.unreadable_lines == 1 else f"{self.unreadable_lines:,} lines"
            self.notes.append(f"{lines} of {name} could not be read and {_are(self.unreadable_lines)} left out.")
        if self.unreadable_loads:
            self.notes.append(f"The expert load of {self.unreadable_loads:,} steps could not be read.")
        if not self.steps:
            self.notes.append(f"{name} holds no step yet.")
        elif missing := [name for name in (*FIELDS[:5], "tokens") if not self._has(name)]:
            self.notes.append(f"Not in {name}, so not shown: {', '.join(missing)}.")
        curves = {field: Curve(*np.array(points, dtype=float).T) for field, points in self.points.items()}
        return RunMetrics(curves, self.loads, tuple(self.skipped), self.steps, self.tokens, tuple(self.notes))

    def _has(self, name: str) -> bool:
        return math.isfinite(self.tokens) if name == "tokens" else name in self.points


def _values(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the fields of a record that become points of curves."""
    for name in FIELDS:
        if name in record:
            yield name, _number(record[name])
    modules = record.get("mtp_losses")
    for module, value in enumerate(modules if isinstance(modules, list) else (), 1):
        yield f"mtp_losses.{module}", _number(value)


def _number(value: Any) -> float:
    """Return a finite number as a float, and anything else as NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def _facts(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what the record of a skipped batch says, in a few words a field."""
    for name, value in record.items():
        if name not in ("step", "sequences", "tokens", "expert_load"):
            text = (
                value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
            )
            yield name.replace("_", " "), text if len(text) <= 200 else f"{text[:200]}…"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"
