"""The page about a plan: everything in it, nothing from outside, foreign text escaped."""

from __future__ import annotations

import re
from copy import deepcopy
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from abyssal.config import load_recipe
from abyssal.plan.calibration import Calibration
from abyssal.plan.facts import plan_facts, search_facts
from abyssal.plan.hardware import packaged_chips, parse_cluster
from abyssal.plan.inference import inference_facts
from abyssal.plan.layout import Layout
from abyssal.plan.search import search
from abyssal.plan.training_plan import plan_training
from abyssal.report.plan_page import render_plan
from abyssal.report.stacked_bars import draw_stacked_bars

EVIL = "<script>alert('x')</script>&\"'"


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    run, cluster = load_recipe("v3_16b"), parse_cluster("h100:16", packaged_chips())
    layout = Layout(pp_size=4, ep_size=4, schedule="dualpipe")
    plan = plan_training([run], cluster, layout, Calibration(), 2.5)
    found = plan_facts(plan, 60e9)
    found["inference"] = inference_facts(run.model, cluster, Calibration())
    found["search"] = search_facts(search(run, cluster, layout, Calibration(), 60e9), 60e9)
    return found


class Tags(HTMLParser):
    """Collects tags, and fails where one closes that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "path", "rect", "line", "polyline") and not any(tag == "br" for tag in (tag,)):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "path", "rect", "line", "polyline"):
            assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_from_outside(facts: dict[str, Any]) -> None:
    page = render_plan(facts, "<svg></svg>", 12)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in tags.seen
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    for text in ("Plan: v3_16b on 16 h100", "Why others fail", "Fitted constants", "exposed_and_imbalance"):
        assert text in page
    assert f"{facts['device_hours']:,.0f}" in page


def test_foreign_text_is_escaped_wherever_it_stands(facts: dict[str, Any]) -> None:
    evil = deepcopy(facts)
    evil["name"] = evil["description"] = EVIL
    evil["cluster"]["name"] = evil["cluster"]["description"] = EVIL
    evil["cluster"]["figures"]["bf16_flops"]["source"] = EVIL
    evil["phases"][0]["name"] = evil["layout"]["text"] = EVIL
    evil["search"]["refused"][0]["reason"] = EVIL
    evil["memory"] |= {"fits": False, "fault": EVIL}
    evil["step"]["parts"] = {EVIL: evil["step"]["parts"]["rank 0"]}
    page = render_plan(evil, "<svg></svg>", 12)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 10


def test_bars_are_as_long_as_their_values() -> None:
    rows = [("a", {"x": 1.0, "y": 3.0}), ("b", {"x": 2.0, "y": 0.0})]
    root = ElementTree.fromstring(draw_stacked_bars(rows, unit="GB", description="d", limit=8.0))
    hints = {}
    for box in root.iter("{http://www.w3.org/2000/svg}rect"):
        title = box.find("{http://www.w3.org/2000/svg}title")
        if title is not None:
            hints[title.text] = float(box.attrib["width"])
    assert set(hints) == {"a, x: 1 GB", "a, y: 3 GB", "b, x: 2 GB"}
    assert hints["a, y: 3 GB"] == pytest.approx(3 * hints["a, x: 1 GB"], rel=1e-3)
    assert hints["b, x: 2 GB"] == pytest.approx(2 * hints["a, x: 1 GB"], rel=1e-3)
    assert 620 / hints["a, x: 1 GB"] == pytest.approx(8, rel=1e-3)  # the limit is the right end
