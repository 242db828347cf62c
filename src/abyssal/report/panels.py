"""Which curves stand in which chart, for one run and for several beside one another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from abyssal.report.charts import AxisScale, ChartLine, draw_curves, draw_loads
from abyssal.report.run_record import RunRecord


@dataclass(frozen=True)
class Panel:
    """One chart: its title, the fields of the metrics in it, and how they are drawn."""

    title: str
    fields: tuple[tuple[str, str], ...]
    scale: AxisScale
    smooth: bool = False
    remark: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart that is drawn: title, SVG, the legend as (label, series), and a remark."""

    title: str
    svg: str
    legend: tuple[tuple[str, int], ...] = ()
    remark: str = ""


NATS = AxisScale("nats a token", logarithmic=True)
PANELS = (
    Panel(
        "Loss",
        (("loss", "main model"), ("mtp_losses.*", "MTP module"), ("validation_loss", "validation")),
        NATS,
        smooth=True,
    ),
    Panel(
        "Validation",
        (("validation_bits_per_byte", "weights"), ("validation_ema_bits_per_byte", "averaged weights")),
        AxisScale("bits per byte"),
    ),
    Panel("Learning rate", (("learning_rate", "learning rate"),), AxisScale("learning rate")),
    Panel(
        "Gradient norm",
        (("gradient_norm", "gradient norm"),),
        AxisScale("norm before clipping", logarithmic=True),
        smooth=True,
    ),
    Panel("Speed", (("tokens_per_s", "tokens/s"),), AxisScale("tokens/s", from_zero=True)),
    Panel("MFU", (("mfu", "MFU"),), AxisScale("% of the matmul peak", percent=True, from_zero=True)),
    Panel(
        "Balance of experts",
        (("max_violation", "MaxVio"),),
        AxisScale("MaxVio"),
        smooth=True,
        remark="The largest load over the mean load, minus 1, averaged over layers; 0 is perfect balance.",
    ),
    Panel("Balance loss", (("balance_loss", "balance loss"),), AxisScale("Σ f P, without α"), smooth=True),
)
SMOOTHED = "Faint: each step; strong: mean of a fiftieth of the run."


def draw_panels(runs: Sequence[RunRecord]) -> list[Chart]:
    """Return the charts for which the runs have measurements; of several runs, each field in a chart of its own."""
    axis = common_axis(runs)
    return [chart for number, panel in enumerate(_panels(runs)) if (chart := _draw(panel, runs, f"c{number}", axis))]


def draw_heatmaps(runs: Sequence[RunRecord]) -> list[Chart]:
    """Return the expert load of every run that recorded one."""
    axis, charts = common_axis(runs), []
    for number, run in enumerate(runs):
        loads = run.metrics.loads
        if len(loads):
            svg = draw_loads(f"h{number}", loads, [_layer(run, layer) for layer in loads.layers], axis=axis)
            charts.append(Chart(run.label, svg))
    return charts


def common_axis(runs: Sequence[RunRecord]) -> str:
    """Return `tokens` where every run counted them, which compares runs of any batch size, else `steps`."""
    return "tokens" if all(math.isfinite(run.metrics.tokens) for run in runs if run.metrics.steps) else "steps"


def _panels(runs: Sequence[RunRecord]) -> Iterator[Panel]:
    """Yield the panels with the fields that there are, divided by field where there are several runs."""
    modules = sorted({name for run in runs for name in run.metrics.curves if name.startswith("mtp_losses.")})
    for panel in PANELS:
        fields: list[tuple[str, str]] = []
        for name, label in panel.fields:
            fields += [(m, f"{label} {m[11:]}") for m in modules] if name == "mtp_losses.*" else [(name, label)]
        fields = [field for field in fields if any(field[0] in run.metrics.curves for run in runs)]
        if len(runs) == 1:
            yield Panel(panel.title, tuple(fields), panel.scale, panel.smooth, panel.remark)
            continue
        for name, label in fields:
            title = f"{panel.title}, {label}" if len(fields) > 1 else panel.title
            yield Panel(title, ((name, label),), panel.scale, panel.smooth, panel.remark)


def _draw(panel: Panel, runs: Sequence[RunRecord], name: str, axis: str) -> Chart | None:
    """Return the chart of one panel, or None where nothing was measured."""
    lines = []
    for run_number, run in enumerate(runs):
        for field_number, (field, label) in enumerate(panel.fields):
            curve = run.metrics.curves.get(field)
            if curve is not None and np.isfinite(curve.values).any():
                several = len(runs) > 1
                lines.append(ChartLine(run.label if several else label, curve, run_number if several else field_number))
    if not lines:
        return None
    # of several runs, nobody could tell whose mark it is
    skipped = (
        [place for batch in runs[0].metrics.skipped if (place := batch.place(axis)) is not None]
        if len(runs) == 1
        else []
    )
    svg = draw_curves(name, lines, panel.scale, axis=axis, smooth=panel.smooth, skipped=skipped)
    smoothed = SMOOTHED if panel.smooth and any(len(line.curve) >= 100 for line in lines) else ""
    remark = " ".join(part for part in (panel.remark, smoothed) if part)
    legend = tuple((line.label, line.series) for line in lines) if len(lines) > 1 else ()
    return Chart(panel.title, svg, legend, remark)


def _layer(run: RunRecord, layer: str) -> str:
    """Return what a layer is called: its number, and of an MTP module's that it is one."""
    layers = run.setting("model.num_hidden_layers")
    return f"MTP {int(layer) - layers + 1}" if isinstance(layers, int) and int(layer) >= layers else layer
