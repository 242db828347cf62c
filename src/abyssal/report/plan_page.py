"""The page about a plan: everything of its facts, in one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from abyssal import __version__
from abyssal.report.numbers import duration, short
from abyssal.report.stacked_bars import draw_stacked_bars

KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers")


def render_plan(facts: Mapping[str, Any], timeline: str, drawn_micro_batches: int) -> str:
    """Return the page about the facts of a plan.

    Args:
        facts: what `plan_facts` returns, with `inference` and, after a search, `search`.
        timeline: the SVG of a step.
        drawn_micro_batches: how many micro-batches of the step it shows.

    The page runs no script and says so in its content security policy. All text of the facts is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "duration": duration, "number": _number, "bytes": _bytes}
    text = environment.get_template("plan.html").render(
        plan=facts,
        version=__version__,
        style=Markup(_resource("page.css")),
        timeline=Markup(timeline),
        drawn=drawn_micro_batches,
        parts=Markup(_parts(facts)),
        memory=Markup(_memory(facts)),
    )
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _parts(facts: Mapping[str, Any]) -> str:
    rows = [(rank, dict(values)) for rank, values in facts["step"]["parts"].items()]
    return draw_stacked_bars(rows, unit="s", description="Seconds of a step by part, for an end and a middle rank")


def _memory(facts: Mapping[str, Any]) -> str:
    memory = facts["memory"]
    rows = [(f"rank {n}", {kind: rank[kind] / 1e9 for kind in KINDS}) for n, rank in enumerate(memory["ranks"])]
    return draw_stacked_bars(
        rows, unit="GB", description="Memory of a device by kind, for each pipeline rank", limit=memory["limit"] / 1e9
    )


def _number(value: float, digits: int = 0) -> str:
    """Write a number with thousands separated."""
    return f"{value:,.{digits}f}"


def _bytes(value: float) -> str:
    """Write bytes in decimal units."""
    text = short(value).replace("B", "G").replace("K", "k")
    return f"{text} B" if text[-1].isdigit() else f"{text[:-1]} {text[-1]}B"


def _resource(name: str) -> str:
    return (resources.files("abyssal.report") / name).read_text(encoding="utf-8")
