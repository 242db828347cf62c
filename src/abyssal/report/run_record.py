"""What the folder of a run holds for its page."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abyssal.errors import UsageError, nearest
from abyssal.report.metrics import RunMetrics, read_metrics

RECIPE, METRICS, SAMPLES = "recipe.toml", "metrics.jsonl", "samples.jsonl"


@dataclass(frozen=True)
class Sample:
    """What the model made of a beginning, and after how many steps if that is known."""

    prompt: str
    completion: str
    step: int | None = None


@dataclass(frozen=True)
class RunRecord:
    """One run as its folder tells it, finished or not."""

    label: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    metrics: RunMetrics = field(default_factory=RunMetrics)
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()

    def setting(self, path: str) -> Any:
        """Return a value of the recipe by its dotted path, or None where it has none."""
        value: Any = self.recipe
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def planned_tokens(self) -> float | None:
        """Return the length that the recipe gives the run, in tokens."""
        tokens = self.setting("train.tokens")
        return float(tokens) if isinstance(tokens, int) and tokens > 0 else None

    @property
    def finished(self) -> bool:
        """Whether every token of the recipe was trained on."""
        planned = self.planned_tokens()
        return planned is not None and self.metrics.tokens >= planned


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run."""
    return (path / RECIPE).is_file() or (path / METRICS).is_file()


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Read the folders of runs; each run is called by its folder's name, or by the path where names are not distinct.

    Raises:
        UsageError: a path is no folder of a run; names the nearest one.
    """
    for path in paths:
        if not is_run(path):
            raise UsageError(f"{path}: {_what_instead(path)}")
    names = [path.resolve().name for path in paths]
    distinct = len(set(names)) == len(names)
    return [_read_run(path, name if distinct else str(path)) for path, name in zip(paths, names, strict=True)]


def _what_instead(path: Path) -> str:
    """Say why `path` is not the folder of a run, and which one may have been meant."""
    if not path.exists():
        folder = path.parent
        siblings = [other.name for other in _runs_in(folder)]
        close = nearest(path.name, siblings)
        hint = f"; nearest: {folder / close.removeprefix('; nearest: ')}" if close else _listed(folder)
        return f"no such folder of a run{hint}"
    if path.parent != path and is_run(path.parent):
        return f"is inside the folder of a run; nearest: {path.parent}"
    if path.is_file():
        return f"is a file, but the folder of a run is needed{_listed(path.parent)}"
    return f"is not the folder of a run (neither {RECIPE} nor {METRICS} is in it){_listed(path)}"


def _runs_in(folder: Path) -> list[Path]:
    return sorted(other for other in folder.iterdir() if is_run(other)) if folder.is_dir() else []


def _listed(folder: Path) -> str:
    runs = [str(path) for path in _runs_in(folder)]
    return f"; runs there: {', '.join(runs[:5])}{', ...' if len(runs) > 5 else ''}" if runs else ""


def _read_run(path: Path, label: str) -> RunRecord:
    notes: list[str] = []
    recipe_text = _read_text(path / RECIPE, notes, needed=True)
    try:
        recipe = tomllib.loads(recipe_text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        recipe = {}
        notes.append(f"{RECIPE} is not valid TOML ({error}), so it is shown but not compared.")
    samples = tuple(_samples(_read_text(path / SAMPLES, notes, needed=False), notes))
    return RunRecord(label, recipe, recipe_text, read_metrics(path / METRICS), samples, tuple(notes))


def _read_text(path: Path, notes: list[str], *, needed: bool) -> str:
    """Return a file's text; what cannot be read becomes a note."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        notes += [f"There is no {path.name}."] if needed else []
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror or error}).")
    return ""


def _samples(text: str, notes: list[str]) -> Iterator[Sample]:
    """Yield the samples of samples.jsonl, and note how many of its lines are none."""
    unreadable = 0
    for line in text.split("\n"):  # not splitlines: a completion may hold other line ends
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            step = values.get("step")
            yield Sample(str(values["prompt"]), str(values["completion"]), step if isinstance(step, int) else None)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            unreadable += 1
    if unreadable:
        notes.append(f"{unreadable:,} of the lines of {SAMPLES} could not be read.")
