"""A page about how a server answered: distributions of the times, and their course."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from abyssal.report.charts import HEIGHT, blank_figure, drawing_settings, svg_text
from abyssal.report.inline_svg import SERIES, WARNING, inline
from abyssal.report.template import render_template

MAX_POINTS = 400  # of a curve; a distribution keeps its ends


@dataclass(frozen=True)
class ServingRecord:
    """What a page shows of a measurement.

    `facts` and `workload` are text by what they are; `rows` are the cells of a table, its head first. `samples` are
    seconds by the name of their quantity. `courses` has, for each request that ended well, when it was due and how long
    its first text and its end took; `failed` when the others were due [s].
    """

    url: str
    model: str
    facts: Mapping[str, str]
    workload: Mapping[str, str]
    rows: Sequence[Sequence[str]]
    errors: Mapping[str, int]
    samples: Mapping[str, Sequence[float]]
    courses: Sequence[tuple[float, float, float]]
    failed: Sequence[float]


def render_serving_page(record: ServingRecord) -> str:
    """Return the page about a measurement."""
    charts = [(title, Markup(svg)) for title, svg in _charts(record)]
    return render_template("serving.html", record=record, charts=charts)


def draw_distribution(name: str, values: Sequence[float], quantity: str) -> str:
    """Return how many of the values [s] are below each time, as SVG for the inside of a page."""
    ordered = np.sort(np.asarray(values)) * 1000
    shares = np.arange(1, len(ordered) + 1) / len(ordered)
    kept = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), MAX_POINTS)).round().astype(int))
    with drawing_settings(name):
        figure, axes = blank_figure(HEIGHT)
        axes.step([ordered[0], *ordered[kept]], [0, *(100 * shares[kept])], where="post", color=SERIES[0])
        for quantile in (50, 99):
            axes.axvline(float(np.percentile(ordered, quantile)), color=SERIES[1], linewidth=1, linestyle=":")
        axes.set_ylim(0, 102)
        axes.set_xlim(left=0)
        _label(axes, f"{quantity} [ms]", "% of values below")
        return inline(svg_text(figure), name, f"distribution of {quantity}")


def draw_course(name: str, courses: Sequence[tuple[float, float, float]], failed: Sequence[float]) -> str:
    """Return each request's time to its first text and to its end over when it was due, as SVG."""
    with drawing_settings(name):
        figure, axes = blank_figure(HEIGHT)
        if courses:
            due, first, end = zip(*courses, strict=True)
            axes.vlines(due, first, end, color=SERIES[0], linewidth=1, alpha=0.35)
            axes.plot(due, first, "o", color=SERIES[1], markersize=3)
            axes.plot(due, end, "o", color=SERIES[0], markersize=3)
        for place in failed:
            axes.axvline(place, ymax=0.06, color=WARNING, linewidth=1.5)
        axes.set_ylim(bottom=0)
        _label(axes, "due after [s]", "took [s]")
        return inline(svg_text(figure), name, "time to first text and to the end of each request")


def _charts(record: ServingRecord) -> list[tuple[str, str]]:
    charts = [
        (f"Distribution of {name}", draw_distribution(f"d{number}", values, name))
        for number, (name, values) in enumerate(record.samples.items())
        if values
    ]
    if record.courses:
        charts.append(("Each request: first text, end", draw_course("c", record.courses, record.failed)))
    return charts


def _label(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
