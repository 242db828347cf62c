"""How evenly experts load their GPUs, before and after they are placed by load, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from abyssal.report.svg_canvas import GRID, SERIES, SvgCanvas

Rows = Sequence[Sequence[float]]

BEFORE, AFTER = 1, 0  # series
LEFT, WIDTH, ROW, TOP, FOOT = 64.0, 620.0, 11.0, 52.0, 34.0
CURVE_HEIGHT = 190.0
#: So many layers get a row each; of more, every n-th is labelled.
LABELS = 30


def draw_placement(layers: Sequence[str], before: Rows, after: Rows) -> str:
    """Return two charts under one another: each layer's busiest GPU, and all GPUs of the layer that was worst.

    Args:
        layers: their names, [L].
        before: load of each GPU in each layer, [L][G], any unit.
        after: the same with the experts placed anew.
    """
    worst = max(range(len(layers)), key=lambda layer: _relative(before[layer])[0])
    bottom = TOP + len(layers) * ROW
    shapes = SvgCanvas(
        LEFT + WIDTH + 20, bottom + FOOT + 40 + CURVE_HEIGHT + FOOT, "load of GPUs before and after placement"
    )
    shapes.text(LEFT, 14, "Busiest GPU over the mean GPU, each layer", size=13)
    _legend(shapes, 34)
    pairs = [(_relative(old)[0], _relative(new)[0]) for old, new in zip(before, after, strict=True)]
    _dumbbells(shapes, layers, pairs, bottom)
    title = bottom + FOOT + 20
    shapes.text(LEFT, title, f"Load of each GPU over the mean, busiest first, layer {layers[worst]}", size=13)
    _curves(shapes, _relative(before[worst]), _relative(after[worst]), title + 20)
    return shapes.svg()


def _dumbbells(shapes: SvgCanvas, layers: Sequence[str], pairs: Sequence[tuple[float, float]], bottom: float) -> None:
    """Draw a line a layer, from its worst GPU before to that after, on an axis that starts at the mean, 1."""
    most = max(2.0, *(value for pair in pairs for value in pair))
    scale = WIDTH / math.log(most)
    for tick in _factors(most):
        place = LEFT + math.log(tick) * scale
        shapes.line(place, TOP, place, bottom)
        shapes.text(place, bottom + 12, f"{tick:g}×", anchor="middle")
    every = math.ceil(len(layers) / LABELS)
    for row, (name, (old, new)) in enumerate(zip(layers, pairs, strict=True)):
        middle = TOP + (row + 0.5) * ROW
        if row % every == 0:
            shapes.text(LEFT - 8, middle, f"layer {name}", anchor="end", size=10)
        left, right = (LEFT + math.log(max(1.0, value)) * scale for value in (new, old))
        shapes.line(left, middle, right, middle)
        shapes.box(right - 3, middle - 3, 6, 6, BEFORE, hint=f"layer {name}, before: {old:.3f}×")
        shapes.box(left - 3, middle - 3, 6, 6, AFTER, hint=f"layer {name}, after: {new:.3f}×")


def _curves(shapes: SvgCanvas, before: Sequence[float], after: Sequence[float], top: float) -> None:
    """Draw the sorted loads of all GPUs as two steps, with the mean as a line."""
    most = max(1.2, *before, *after)
    bottom = top + CURVE_HEIGHT
    for tick in (0.0, *_factors(most)):
        height = bottom - tick / most * CURVE_HEIGHT
        shapes.line(LEFT, height, LEFT + WIDTH, height, colour=GRID)
        shapes.text(LEFT - 8, height, f"{tick:g}×", anchor="end", size=10)
    for series, loads in ((BEFORE, before), (AFTER, after)):
        step = WIDTH / len(loads)
        points = [
            (LEFT + (gpu + end) * step, bottom - load / most * CURVE_HEIGHT)
            for gpu, load in enumerate(loads)
            for end in (0, 1)
        ]
        shapes.polyline(points, SERIES[series])
    shapes.text(LEFT + WIDTH / 2, bottom + 14, f"{len(before)} GPUs", anchor="middle")


def _legend(shapes: SvgCanvas, middle: float) -> None:
    for left, series, name in ((LEFT, BEFORE, "before: experts in order, none copied"), (LEFT + 270, AFTER, "after")):
        shapes.box(left, middle - 5, 10, 10, series)
        shapes.text(left + 15, middle, name)


def _relative(loads: Sequence[float]) -> list[float]:
    """Return loads over their mean, the busiest first; all 1 where there is none."""
    total = math.fsum(loads)
    return sorted((load * len(loads) / total if total > 0 else 1.0 for load in loads), reverse=True)


def _factors(most: float) -> list[float]:
    """Return round factors from 1 to `most`, few enough to be read."""
    digits = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if most <= 10 else (1.0, 2.0, 5.0)
    return [factor for power in range(5) for digit in digits if (factor := digit * 10**power) <= most]
