"""The page: everything about the runs that it is given, in one HTML file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abyssal.report.numbers import duration, short
from abyssal.report.panels import draw_heatmaps, draw_panels
from abyssal.report.run_record import RunRecord
from abyssal.report.template import render_template

MAX_SKIPPED = 100
NOTHING = "–"


@dataclass(frozen=True)
class Difference:
    """A field of the recipe in which runs differ, and its value in each."""

    field: str
    values: tuple[str, ...]


def render_page(runs: Sequence[RunRecord]) -> str:
    """Return the page about one run, or about several with their curves laid over one another.

    All text that comes from the folders is escaped by the template.
    """
    return render_template(
        "page.html",
        title=_title(runs),
        runs=runs,
        facts=[headline(run) for run in runs],
        charts=draw_panels(runs),
        heatmaps=draw_heatmaps(runs),
        differences=differences(runs),
        most_skipped=MAX_SKIPPED,
    )


def headline(run: RunRecord) -> dict[str, str]:
    """Return the figures that sum up a run, as text by what they are."""
    metrics, planned = run.metrics, run.planned_tokens()
    tokens, time, mfu = metrics.tokens, metrics.training_time_s(), metrics.mean_mfu()
    share = f" of {short(planned)}" if planned is not None and not run.finished else ""
    loss, score = metrics.last("loss"), metrics.last("validation_bits_per_byte")
    return {
        "Steps": f"{metrics.steps:,}",
        "Tokens": f"{short(tokens)}{share}" if math.isfinite(tokens) else NOTHING,
        "Training time": duration(time) if time is not None else NOTHING,
        "Tokens/s": f"{metrics.tokens_timed() / time:,.0f}" if time else NOTHING,
        "MFU": f"{mfu:.1%}" if mfu is not None else NOTHING,
        "Last loss": f"{loss:.3f}" if loss is not None else NOTHING,
        "Validation bits per byte": f"{score:.3f}" if score is not None else NOTHING,
    }


def differences(runs: Sequence[RunRecord]) -> list[Difference]:
    """Return the fields of the recipes that are not the same in all runs; a run without a readable recipe has none."""
    flat = [dict(_flatten(run.recipe)) for run in runs]
    names = dict.fromkeys(name for fields in flat for name in fields)
    rows = [Difference(name, tuple(fields.get(name, NOTHING) for fields in flat)) for name in names]
    return [row for row in rows if len(set(row.values)) > 1]


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of a recipe as text by their dotted path."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif key == "segments" and isinstance(value, list):
            yield f"{prefix}{key}", "; ".join(_segment(part) for part in value) or "none"
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _segment(part: Any) -> str:
    """Write one segment of a schedule in a few words: `cosine to 2.2e-05 until 14300000000000`."""
    if not isinstance(part, Mapping):
        return json.dumps(part, default=str)
    words = [str(part.get("shape", "")), f"to {part['to']}" if "to" in part else "", f"until {part.get('until', '?')}"]
    return " ".join(word for word in words if word)


def _title(runs: Sequence[RunRecord]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs: {', '.join(run.label for run in runs)}"
    name = runs[0].setting("name")
    return f"Run {name}" if isinstance(name, str) and name else f"Run {runs[0].label}"
