"""Horizontal bars made of parts, as SVG for the inside of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from abyssal.report.svg_canvas import SOFT, SvgCanvas

ROW, GAP, LEFT, TOP, FOOT, PLOT, RIGHT = 20.0, 5.0, 62.0, 6.0, 26.0, 620.0, 56.0
CHARACTER = 6.5


def draw_stacked_bars(
    rows: Sequence[tuple[str, Mapping[str, float]]], *, unit: str, description: str, limit: float | None = None
) -> str:
    """Return bars with a row each, their parts in the order and the colours of their names, and a line at `limit`.

    Values are in `unit`. The names are explained below the bars.
    """
    names = list(dict.fromkeys(name for _, parts in rows for name in parts))
    most = max([limit or 0.0, *(sum(parts.values()) for _, parts in rows)]) or 1.0
    legend = _legend_rows(names)
    bottom = TOP + len(rows) * (ROW + GAP)
    shapes = SvgCanvas(LEFT + PLOT + RIGHT, bottom + FOOT + 18 * len(legend), description)
    scale = PLOT / most
    for number, (label, parts) in enumerate(rows):
        top, left = TOP + number * (ROW + GAP), LEFT
        shapes.text(LEFT - 8, top + ROW / 2, label, anchor="end")
        for name, value in parts.items():
            if value > 0:
                series = names.index(name) % 8
                shapes.box(left, top, value * scale, ROW, series, hint=f"{label}, {name}: {value:.4g} {unit}")
                left += value * scale
        shapes.text(left + 5, top + ROW / 2, f"{sum(parts.values()):.4g}")
    if limit is not None:
        shapes.line(LEFT + limit * scale, TOP - 4, LEFT + limit * scale, bottom, colour=SOFT)
        shapes.text(LEFT + limit * scale, bottom + 10, f"{limit:.4g} {unit}", anchor="middle")
    else:
        shapes.text(LEFT, bottom + 10, unit)
    for row, entries in enumerate(legend):
        left = LEFT
        for name in entries:
            middle = bottom + FOOT + 18 * row + 8
            shapes.box(left, middle - 6, 12, 12, names.index(name) % 8)
            shapes.text(left + 17, middle, name)
            left += 34 + CHARACTER * len(name)
    return shapes.svg()


def _legend_rows(names: Sequence[str]) -> list[list[str]]:
    """Break names into rows that fit under the bars."""
    rows: list[list[str]] = [[]]
    left = 0.0
    for name in names:
        width = 34 + CHARACTER * len(name)
        if left + width > PLOT and rows[-1]:
            rows.append([])
            left = 0.0
        rows[-1].append(name)
        left += width
    return rows
