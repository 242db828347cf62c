"""From the SVG that matplotlib writes to one that lives inside a page: the page's colours, ids of its own, no links."""

from __future__ import annotations

import re
from xml.etree import ElementTree

#: Colours to draw with. Each stands for a variable of the page's style sheet, which has a light and a dark value.
INK, GRID, WARNING = "#0a0c00", "#0a0c01", "#0a0c02"
SERIES = tuple(f"#0a0b{number:02x}" for number in range(8))
VARIABLES = {INK: "--soft", GRID: "--grid", WARNING: "--warning"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES)
}


def inline(svg: str, name: str, description: str) -> str:
    """Return a figure for the inside of an HTML page, where several of them stand.

    Args:
        svg: the file that matplotlib wrote; its text is escaped already, and is again on the way out.
        name: distinct in the page; opens every id in the figure.
        description: read out to those who do not see the figure.
    """
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            # the style sheet in there would hold for the whole page, and the metadata is about matplotlib
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)  # HTML knows svg by itself, without namespaces
        element.attrib = {_local(key): _clean(_local(key), value, name) for key, value in element.attrib.items()}
        if element.tag == "g" and element.attrib.get("id", "").startswith(name):
            del element.attrib["id"]  # groups are not referred to
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": description}
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _clean(key: str, value: str, name: str) -> str:
    """Return the value of an attribute: ids with the figure's name in front, colours of the page, two decimals."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    if key in ("d", "x", "y", "transform", "points"):
        return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", value).replace("\n", " ").strip()
    value = value.replace("url(#", f"url(#{name}-")
    return re.sub(r"#0a0[bc][0-9a-f]{2}", lambda colour: f"var({VARIABLES[colour[0]]})", value)
