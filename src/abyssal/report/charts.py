"""The figures of a page, drawn by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from abyssal.report.curve import Curve, Values, downsample, running_mean
from abyssal.report.expert_load import LoadHistory, load_image
from abyssal.report.inline_svg import GRID, INK, SERIES, WARNING, inline
from abyssal.report.numbers import short

POINTS_PER_INCH = 72
#: So narrow that its text can still be read when a phone shows the whole figure [points].
WIDTH, HEIGHT = 440.0, 235.0
LEFT, RIGHT, BOTTOM, TOP = 58.0, 12.0, 40.0, 10.0
#: Buckets of all the curves of a figure together; each bucket is drawn as two points.
BUCKETS = 900
DASHES = ("-", "--", ":", "-.")
#: A load of four times the mean, or a quarter of it, has the full colour.
MAX_DEVIATION = 2.0
UNDER, OVER = (0.11, 0.49, 0.84), (0.91, 0.35, 0.05)


@dataclass(frozen=True, eq=False)
class ChartLine:
    """One curve of a chart, and which of the series it is."""

    label: str
    curve: Curve
    series: int


@dataclass(frozen=True)
class AxisScale:
    """How the y axis of a chart reads."""

    unit: str
    logarithmic: bool = False
    percent: bool = False
    from_zero: bool = False


def draw_curves(
    name: str,
    lines: Sequence[ChartLine],
    scale: AxisScale,
    *,
    axis: str,
    smooth: bool = False,
    skipped: Sequence[float] = (),
) -> str:
    """Return a chart as SVG for the inside of a page.

    Args:
        name: distinct in the page.
        lines: at least one of them with a finite value.
        scale: of the y axis.
        axis: `tokens` or `steps`.
        smooth: draw a running mean over a fiftieth of the curve as well, and the curve itself faintly.
        skipped: where batches were left out, marked at the foot.
    """
    with drawing_settings(name):
        figure, axes = blank_figure(HEIGHT)
        for line in lines:
            _draw(axes, line, axis, smooth=smooth, buckets=max(60, BUCKETS // len(lines)))
        if scale.logarithmic:
            _scale_by_factors(axes, [line.curve.values for line in lines])
        axes.yaxis.set_major_formatter(FuncFormatter(_percent if scale.percent else _plain))
        if scale.from_zero:
            axes.set_ylim(bottom=0)
        for place in skipped:
            axes.axvline(place, ymax=0.06, color=WARNING, linewidth=1.5)
        axes.set_xlim(0, 1.02 * max(np.nanmax(line.curve.along(axis), initial=1.0) for line in lines))
        _label(axes, axis, scale.unit)
        described = f"{scale.unit} over {axis}: " + ", ".join(line.label for line in lines)
        return inline(svg_text(figure), name, described)


def draw_loads(name: str, history: LoadHistory, labels: Sequence[str], *, axis: str) -> str:
    """Return the expert load of each layer, called by `labels`, over time as a heatmap in SVG."""
    deviation, (begin, end) = load_image(history, axis)
    height = min(480.0, max(180.0, 6.0 * len(deviation))) + BOTTOM + TOP
    with drawing_settings(name):
        figure, axes = blank_figure(height, right=70.0)
        layers = len(labels)
        image = axes.imshow(
            np.ma.masked_invalid(np.clip(deviation, -MAX_DEVIATION, MAX_DEVIATION)),
            cmap=_two_sided(),
            norm=Normalize(-MAX_DEVIATION, MAX_DEVIATION),
            interpolation="none",
            aspect="auto",
            extent=(begin, end if end > begin else begin + 1, layers, 0),
        )
        axes.grid(visible=False)
        for border in range(1, layers):
            axes.axhline(border, color=INK, linewidth=0.8 if layers <= 24 else 0.25)
        every = math.ceil(layers / 20)
        axes.set_yticks([layer + 0.5 for layer in range(0, layers, every)], list(labels[::every]))
        axes.tick_params(axis="y", length=0)
        _label(axes, axis, "layer, a row an expert")
        bar_axes = figure.add_axes((1 - 56 / WIDTH, BOTTOM / height, 12 / WIDTH, 1 - (BOTTOM + TOP) / height))
        bar = figure.colorbar(image, cax=bar_axes, ticks=[-2, -1, 0, 1, 2])
        bar.ax.set_yticklabels(["¼×", "½×", "mean", "2×", "4×"])
        bar.ax.grid(visible=False)
        bar.ax.patch.set_visible(False)
        bar.outline.set_edgecolor(GRID)
        described = f"load of each expert over the mean of its layer, over {axis}, {layers} layers"
        return inline(svg_text(figure), name, described)


@contextmanager
def drawing_settings(name: str) -> Iterator[None]:
    """Draw with text as text, in the colours that the page replaces, and the same bytes every time."""
    settings: Any = {  # its keys are literals to the type checker
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "svg.image_inline": True,
        "text.parse_math": False,
        "text.usetex": False,
        "font.family": "DejaVu Sans",  # comes with matplotlib; measures the labels, the page chooses what is shown
        "font.size": 11,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "axes.linewidth": 1,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
    }
    with mpl.rc_context(settings):
        yield


def blank_figure(height: float, right: float = RIGHT) -> tuple[Figure, Axes]:
    """Return a figure with room for the labels, and its axes; sizes in points."""
    figure = Figure(figsize=(WIDTH / POINTS_PER_INCH, height / POINTS_PER_INCH))
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    box = (LEFT / WIDTH, BOTTOM / height, 1 - (LEFT + right) / WIDTH, 1 - (BOTTOM + TOP) / height)
    axes = figure.add_axes(box)
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure, axes


def _draw(axes: Axes, line: ChartLine, axis: str, *, smooth: bool, buckets: int) -> None:
    """Draw one curve: a few measurements with their points, many with their running mean if wanted."""
    x, y = line.curve.along(axis), line.curve.values
    measured = np.isfinite(x)
    x, y = x[measured], y[measured]
    colour = SERIES[line.series % len(SERIES)]
    dash = DASHES[line.series // len(SERIES) % len(DASHES)]
    window = len(y) // 50 if smooth else 0
    if window > 1:
        axes.plot(*downsample(x, y, buckets), color=colour, linewidth=0.8, alpha=0.35)
        y = running_mean(y, window)
    marker = "o" if len(y) <= 40 else ""
    axes.plot(*downsample(x, y, buckets), color=colour, linewidth=1.6, linestyle=dash, marker=marker, markersize=3)


def _scale_by_factors(axes: Axes, values: Sequence[Values]) -> None:
    """Make the y axis logarithmic, if there is anything above 0."""
    finite = np.concatenate([part[np.isfinite(part) & (part > 0)] for part in values])
    if not len(finite):
        return
    axes.set_yscale("log")
    decades = math.log10(finite.max() / finite.min())
    wide, narrow = (1.0,), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=wide if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 1 else narrow))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    if decades < 0.3:  # too little for two ticks of that kind
        axes.yaxis.set_major_locator(MaxNLocator(4))


def _label(axes: Axes, axis: str, unit: str) -> None:
    """Write what the axes are, with few and round ticks."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel(axis)
    axes.set_ylabel(unit)
    axes.yaxis.set_label_coords(-44 / (WIDTH - LEFT - RIGHT), 0.5)


def _plain(value: float, _: int | None) -> str:
    """Write a tick: 0.002, 3e-05, 12K."""
    return short(value) if abs(value) >= 1000 else f"{value:.4g}"


def _percent(value: float, _: int | None) -> str:
    return f"{100 * value:.3g}%"


def _two_sided() -> ListedColormap:
    """Return colours from too little over none at all to too much: the page shows through where load is even."""
    strength = np.linspace(-1, 1, 65)[:, None]
    colours = np.where(strength < 0, UNDER, OVER)
    return ListedColormap(np.concatenate([colours, np.abs(strength) ** 0.8], axis=1))


def svg_text(figure: Figure) -> str:
    """Return a figure as the SVG file that matplotlib writes."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
