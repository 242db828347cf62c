"""The page about a plan: everything of its facts, in one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from abyssal.report.stacked_bars import draw_stacked_bars
from abyssal.report.template import render_template

KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers")


def render_plan(facts: Mapping[str, Any], timeline: str, drawn_micro_batches: int) -> str:
    """Return the page about the facts of a plan.

    Args:
        facts: what `plan_facts` returns, with `inference` and, after a search, `search`.
        timeline: the SVG of a step.
        drawn_micro_batches: how many micro-batches of the step it shows.
    """
    return render_template(
        "plan.html",
        plan=facts,
        timeline=Markup(timeline),
        drawn=drawn_micro_batches,
        parts=Markup(_parts(facts)),
        memory=Markup(_memory(facts)),
    )


def _parts(facts: Mapping[str, Any]) -> str:
    rows = [(rank, dict(values)) for rank, values in facts["step"]["parts"].items()]
    return draw_stacked_bars(rows, unit="s", description="Seconds of a step by part, for an end and a middle rank")


def _memory(facts: Mapping[str, Any]) -> str:
    memory = facts["memory"]
    rows = [(f"rank {n}", {kind: rank[kind] / 1e9 for kind in KINDS}) for n, rank in enumerate(memory["ranks"])]
    return draw_stacked_bars(
        rows, unit="GB", description="Memory of a device by kind, for each pipeline rank", limit=memory["limit"] / 1e9
    )
