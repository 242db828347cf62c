"""Simple shapes as SVG, in the colours of the page, or in light ones of their own where there is no page."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

#: The variables of the page's style sheet, and the colours where nothing sets them: a file opened by itself.
SOFT = "var(--soft, #545d68)"
GRID = "var(--grid, #d9dde2)"
PAPER = "var(--page, #ffffff)"
SERIES = tuple(
    f"var(--series-{number}, {colour})"
    for number, colour in enumerate(
        ("#1864c7", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#a61e4d", "#8a6100", "#495057")
    )
)


class SvgCanvas:
    """Collects shapes and texts in a coordinate system whose y axis points down."""

    def __init__(self, width: float, height: float, description: str) -> None:
        """Begin a picture of that size; `description` is read out to those who do not see it."""
        size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
        self._parts = [  # the page's style sheet overrules width and height; a viewer of the file scrolls
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" '
            f"aria-label={quoteattr(description)} font-family=\"system-ui, 'DejaVu Sans', sans-serif\">",
            f'<rect width="100%" height="100%" fill="{PAPER}"/>',
        ]

    def box(
        self, left: float, top: float, width: float, height: float, series: int, *, hint: str = "", opacity: float = 1.0
    ) -> None:
        """Add a filled rectangle in a series' colour; `hint` is shown where the pointer rests."""
        faint = f' fill-opacity="{opacity:g}"' if opacity < 1 else ""
        place = f'x="{left:.2f}" y="{top:.2f}" width="{width:.2f}" height="{height:.2f}"'
        title = f"<title>{escape(hint)}</title>" if hint else ""
        self._parts.append(
            f'<rect {place} fill="{SERIES[series]}"{faint} stroke="{PAPER}" stroke-width="0.6">{title}</rect>'
        )

    def text(
        self, left: float, middle: float, text: str, *, anchor: str = "start", size: float = 11, on: bool = False
    ) -> None:
        """Add a text, `middle` the height of its middle; `on` a box, in the colour of the page."""
        self._parts.append(
            f'<text x="{left:.2f}" y="{middle + 0.36 * size:.2f}" text-anchor="{anchor}" font-size="{size:g}" '
            f'fill="{PAPER if on else SOFT}" pointer-events="none">{escape(text)}</text>'
        )

    def line(self, x0: float, y0: float, x1: float, y1: float, *, colour: str = GRID) -> None:
        """Add a thin line."""
        self._parts.append(
            f'<line x1="{x0:.2f}" y1="{y0:.2f}" x2="{x1:.2f}" y2="{y1:.2f}" stroke="{colour}" stroke-width="0.8"/>'
        )

    def polyline(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        """Add an open line through points (x, y)."""
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')

    def svg(self) -> str:
        """Return the picture."""
        return "\n".join([*self._parts, "</svg>"]) + "\n"
