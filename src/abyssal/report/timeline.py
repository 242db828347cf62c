"""What each rank of a pipeline does when, as an SVG of its own or for the inside of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from abyssal.report.svg_canvas import SvgCanvas

ROW, GAP, LEFT, TOP, FOOT = 22.0, 4.0, 58.0, 30.0, 30.0
#: All boxes but the shortest tenth are at least so wide, so that their numbers can be read; then the whole picture.
BOX_WIDTH, MIN_WIDTH, MAX_WIDTH = 18.0, 640.0, 12_000.0
CHARACTER = 6.5
#: The series of the page that colours each kind of action, and what the legend calls it.
KINDS = {
    "F": (0, "forward"),
    "B": (2, "backward"),
    "I": (4, "backward, input only"),
    "W": (1, "backward, weights only"),
}
DOWNWARDS = 0.6


class TimelineBox(Protocol):
    """One action: its row and times, its kind (a key of `KINDS`), its number, and whether it shares the row.

    `lane` is 0 for the whole height, 1 for the upper half and 2 for the lower; `direction` 1 is drawn paler.
    """

    @property
    def row(self) -> int: ...  # noqa: D102
    @property
    def start(self) -> float: ...  # noqa: D102
    @property
    def end(self) -> float: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def label(self) -> str: ...  # noqa: D102
    @property
    def hint(self) -> str: ...  # noqa: D102
    @property
    def lane(self) -> int: ...  # noqa: D102
    @property
    def direction(self) -> int: ...  # noqa: D102


def draw_timeline(boxes: Sequence[TimelineBox], *, description: str, unit: str = "") -> str:
    """Return the timeline of `boxes` as SVG, with a row a rank, a legend, and an axis of times in `unit`.

    The colours are those of the page where it stands in one, else its own for a light background.
    """
    rows = max((box.row for box in boxes), default=0) + 1
    end = max((box.end for box in boxes), default=0.0) or 1.0
    lengths = sorted(box.end - box.start for box in boxes) or [end]
    short = lengths[len(lengths) // 10] or end
    plot = min(MAX_WIDTH, max(MIN_WIDTH, BOX_WIDTH * end / short))
    bottom = TOP + rows * (ROW + GAP)
    shapes = SvgCanvas(LEFT + plot + 12, bottom + FOOT, description)
    _draw_legend(shapes, {box.kind for box in boxes}, two_ways=any(box.direction for box in boxes))
    for row in range(rows):
        shapes.text(LEFT - 8, TOP + row * (ROW + GAP) + ROW / 2, f"rank {row}", anchor="end")
    scale = plot / end
    for tick in _ticks(end, plot):
        shapes.line(LEFT + tick * scale, TOP, LEFT + tick * scale, bottom)
        shapes.text(LEFT + tick * scale, bottom + 12, f"{tick:.6g}{unit and ' '}{unit}", anchor="middle")
    for box in boxes:
        _draw_box(shapes, box, scale)
    return shapes.svg()


def _draw_box(shapes: SvgCanvas, box: TimelineBox, scale: float) -> None:
    top, height = TOP + box.row * (ROW + GAP), ROW
    if box.lane:
        top, height = top + (box.lane - 1) * ROW / 2, ROW / 2
    left, width = LEFT + box.start * scale, (box.end - box.start) * scale
    series, _ = KINDS[box.kind]
    shapes.box(left, top, width, height, series, hint=box.hint, opacity=DOWNWARDS if box.direction else 1.0)
    if width >= CHARACTER * len(box.label) + 1:
        shapes.text(left + width / 2, top + height / 2, box.label, anchor="middle", size=9 if box.lane else 11, on=True)


def _draw_legend(shapes: SvgCanvas, kinds: set[str], *, two_ways: bool) -> None:
    left = LEFT
    entries = [(series, name, 1.0) for kind, (series, name) in KINDS.items() if kind in kinds]
    if two_ways:
        entries.append((KINDS["F"][0], "paler: entered at the last rank", DOWNWARDS))
    for series, name, opacity in entries:
        shapes.box(left, 8, 12, 12, series, opacity=opacity)
        shapes.text(left + 17, 14, name)
        left += 34 + CHARACTER * len(name)


def _ticks(end: float, plot: float) -> list[float]:
    """Return round times, about 120 units of the picture apart."""
    wanted = end / max(2.0, plot / 120)
    step = 10.0 ** math.floor(math.log10(wanted))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= wanted)
    return [number * step for number in range(int(end / step + 1e-9) + 1)]
