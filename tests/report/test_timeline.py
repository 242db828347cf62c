"""Timelines and placements as SVG."""

import math
from dataclasses import dataclass
from xml.etree import ElementTree

import pytest

from abyssal.report.placement import draw_placement
from abyssal.report.svg_canvas import SERIES
from abyssal.report.timeline import KINDS, draw_timeline

SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Box:
    row: int
    start: float
    end: float
    kind: str = "F"
    label: str = "7"
    hint: str = ""
    lane: int = 0
    direction: int = 0


def parts(svg, name):
    return list(ElementTree.fromstring(svg).iter(f"{SVG}{name}"))


def hinted(svg):
    """The boxes with a hint, as {hint: attributes}."""
    return {rect[0].text: rect.attrib for rect in parts(svg, "rect") if len(rect)}


def texts(svg):
    return [text.text for text in parts(svg, "text")]


def test_boxes_stand_where_their_times_are():
    boxes = [Box(0, 0, 2, hint="a"), Box(0, 3, 4, "B", hint="b"), Box(1, 1, 2, "W", hint="c")]
    found = hinted(draw_timeline(boxes, description="three"))
    unit = float(found["a"]["width"]) / 2
    left = float(found["a"]["x"])
    for hint, box in zip("abc", boxes, strict=True):
        assert float(found[hint]["x"]) == pytest.approx(left + unit * box.start, abs=0.02)
        assert float(found[hint]["width"]) == pytest.approx(unit * (box.end - box.start), abs=0.02)
        assert found[hint]["fill"] == SERIES[KINDS[box.kind][0]]
    assert found["a"]["y"] == found["b"]["y"] != found["c"]["y"]


def test_the_two_of_a_pair_share_the_height_of_a_row():
    boxes = [Box(0, 0, 3, hint="up", lane=1), Box(0, 0, 3, "B", hint="down", lane=2), Box(0, 3, 4, hint="whole")]
    found = hinted(draw_timeline(boxes, description="pair"))
    assert found["up"]["y"] == found["whole"]["y"]
    assert float(found["down"]["y"]) == float(found["up"]["y"]) + float(found["up"]["height"])
    assert float(found["up"]["height"]) + float(found["down"]["height"]) == float(found["whole"]["height"])


def test_labels_are_written_where_they_fit_and_the_legend_names_what_is_there():
    long, short = Box(0, 0, 50, label="12"), Box(0, 50, 50.1, "I", label="345")
    shown = texts(draw_timeline([long, short], description="two"))
    assert "12" in shown
    assert "345" not in shown
    assert "forward" in shown
    assert "backward, input only" in shown
    assert "backward, weights only" not in shown
    assert not any("last rank" in text for text in shown)
    downwards = draw_timeline([Box(0, 0, 1, hint="a", direction=1)], description="down")
    assert any("last rank" in text for text in texts(downwards))
    assert "fill-opacity" in hinted(downwards)["a"]


@pytest.mark.parametrize("end", [1e-6, 0.3, 19.93, 66.0, 12345.0])
def test_ticks_are_round_and_within_the_time(end):
    svg = draw_timeline([Box(0, 0, end / 9), Box(0, end / 9, end)], description="ticks", unit="s")
    ticks = [float(text.removesuffix(" s")) for text in texts(svg) if text.endswith(" s")]
    assert ticks[0] == 0
    assert 3 <= len(ticks) <= 12
    assert ticks[-1] <= end * (1 + 1e-6)
    first_digits = f"{ticks[1]:e}".partition("e")[0]
    assert float(first_digits) in (1.0, 2.0, 5.0)


def test_descriptions_and_hints_are_escaped_and_nothing_is_drawn_of_nothing():
    svg = draw_timeline([Box(0, 0, 1, hint='<b> & "c"', label="<")], description='<"&>')
    assert ElementTree.fromstring(svg).get("aria-label") == '<"&>'
    assert list(hinted(svg)) == ['<b> & "c"']
    assert hinted(draw_timeline([], description="empty")) == {}


def test_a_picture_that_would_be_too_long_is_compressed():
    boxes = [Box(0, number, number + 0.01) for number in range(1000)]
    picture = ElementTree.fromstring(draw_timeline(boxes, description="long"))
    assert picture.get("viewBox") == f"0 0 {picture.get('width')} {picture.get('height')}"
    assert 11_000 < float(picture.get("width")) < 12_200


def test_placement_shows_each_layer_s_worst_gpu_before_and_after():
    before = [[4.0, 2.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    after = [[2.0, 2.0, 2.0], [4.0, 3.0, 2.0], [0.0, 0.0, 0.0]]
    svg = draw_placement(("3", "4", "5"), before, after)
    expected = {"layer 3": (2.0, 1.0), "layer 4": (3.0, 4 / 3), "layer 5": (1.0, 1.0)}
    found = hinted(svg)
    places = {}
    for layer, values in expected.items():
        for word, value in zip(("before", "after"), values, strict=True):
            places[value] = float(found[f"{layer}, {word}: {value:.3f}×"]["x"])
    scale = (places[3.0] - places[1.0]) / math.log(3)
    for value, place in places.items():
        assert place == pytest.approx(places[1.0] + scale * math.log(value), abs=0.05)
    assert any(text.endswith("layer 4") for text in texts(svg))
    old, new = (
        [float(point.partition(",")[2]) for point in line.get("points").split()] for line in parts(svg, "polyline")
    )
    for heights in (old, new):  # busiest first; y points down
        assert heights == sorted(heights)
        assert len(heights) == 2 * 3
    assert old[0] < new[0]
    assert old[-1] > new[-1]


def test_placement_of_many_layers_labels_some():
    layers = [str(number) for number in range(61)]
    rows = [[1.0 + number, 2.0] for number in range(61)]
    svg = draw_placement(layers, rows, rows)
    assert sum(text.startswith("layer ") for text in texts(svg)) <= 31
