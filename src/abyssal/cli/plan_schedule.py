"""`abyssal plan schedule`: a pipeline schedule simulated, counted and drawn."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from abyssal.plan.schedules import PipelineSchedule, Timeline
    from abyssal.plan.schedules.summary import PassTimes, ScheduleSummary

#: How the terminal colours the parts of a rank's time, and what the legend calls them.
STYLES = {
    "F": ("blue", "F forward"),
    "B": ("green", "B backward"),
    "I": ("cyan", "I backward, inputs only"),
    "W": ("red", "W backward, weights only"),
    "F&B": ("magenta", "& forward and backward overlapped"),
    "idle": ("dim", "· idle"),
}


def schedule(
    name: Annotated[str, typer.Argument(metavar="SCHEDULE", help="1f1b, interleaved, zb1p, dualpipe or dualpipev.")],
    ranks: Annotated[int, typer.Option("--ranks", help="Ranks of the pipeline.")] = 8,
    micro_batches: Annotated[int, typer.Option("--micro-batches", help="Micro-batches of a step.")] = 20,
    stages_per_rank: Annotated[
        int | None, typer.Option("--stages-per-rank", help="Stages a rank, of interleaved.", show_default="2")
    ] = None,
    forward: Annotated[float, typer.Option("--forward", help="Time of a rank's forward pass, F.")] = 1.0,
    backward_input: Annotated[
        float, typer.Option("--backward-input", help="Time of the gradients of inputs, B - W.")
    ] = 1.0,
    backward_weight: Annotated[
        float, typer.Option("--backward-weight", help="Time of the gradients of weights, W.")
    ] = 1.0,
    overlapped: Annotated[
        float | None, typer.Option("--overlapped", help="Time of both passes overlapped, F&B.", show_default="F + B")
    ] = None,
    transfer: Annotated[float, typer.Option("--transfer", help="Time of a message between ranks.")] = 0.0,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw the timeline.")] = None,
    trace_file: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write a trace for ui.perfetto.dev, .json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: each rank's actions, and the figures.")] = False,
) -> None:
    """Show what each rank of a pipeline does when: the timeline, the bubble and the memory, beside other schedules.

    Times are in any unit, for the part of the model that one rank computes. Examples:

        abyssal plan schedule dualpipe --ranks 8 --micro-batches 20
        abyssal plan schedule zb1p --ranks 4 --micro-batches 12 --svg zb1p.svg --trace zb1p.json
    """
    from abyssal.cli.output_file import write_output
    from abyssal.plan.schedules import boxes, build_schedule, trace
    from abyssal.plan.schedules.summary import PassTimes, run_schedule, summarise
    from abyssal.report.timeline import draw_timeline

    times = PassTimes(forward, backward_input, backward_weight, overlapped, transfer)
    check_times(times)
    table = build_schedule(name, ranks, micro_batches, stages_per_rank)
    timeline = run_schedule(table, times)
    if svg:
        drawing = draw_timeline(boxes(timeline), description=title_of(table))
        write_output("--svg", svg, ".svg", drawing)
    if trace_file:
        write_output("--trace", trace_file, ".json", json.dumps(trace(timeline)))
    summary = summarise(timeline, times)
    if as_json:
        typer.echo(json.dumps(facts(timeline, times, summary), indent=1))
        return
    from rich.console import Console

    console = Console(highlight=False)
    print_timeline(console, timeline)
    print_comparison(console, summary, table, times)
    for path in (svg, trace_file):
        if path:
            console.print(f"written: {path}", markup=False)


def check_times(times: PassTimes) -> None:
    """Raise UsageError unless each time is a finite number of at least 0, and the passes take some."""
    from abyssal.errors import UsageError

    for name, value in asdict(times).items():
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: must be a number of at least 0")
    if times.forward + times.backward <= 0:
        raise UsageError("--forward, --backward-input and --backward-weight are all 0: at least one must take time")


def title_of(table: PipelineSchedule) -> str:
    """Say in a line what a schedule is."""
    from abyssal.plan.schedules import SCHEDULES

    return (
        f"{SCHEDULES[table.name].title}: {table.num_ranks} ranks, {table.num_stages} stages, "
        f"{table.micro_batches} micro-batches"
    )


def facts(timeline: Timeline, times: PassTimes, summary: ScheduleSummary) -> dict[str, Any]:
    """Return everything about a simulated schedule: its table, each action's times, the parts of each rank's time."""
    table = timeline.schedule
    return {
        "name": table.name,
        "micro_batches": table.micro_batches,
        "placement": table.placement,
        "times": asdict(times),
        "summary": asdict(summary),
        "ranks": [
            {
                "parts": timeline.parts(rank),
                "cells": [{"cell": str(span.cell), "start": span.start, "end": span.end} for span in spans],
            }
            for rank, spans in enumerate(timeline.ranks)
        ],
    }


def print_timeline(console: Console, timeline: Timeline) -> None:
    """Print a row a rank, and what the letters mean."""
    from rich.text import Text

    from abyssal.plan.schedules import text_rows

    console.print(title_of(timeline.schedule), style="bold")
    console.print()
    ranks = timeline.schedule.num_ranks
    margin = len(f"rank {ranks - 1}  ")
    seen = set()
    for rank, row in enumerate(text_rows(timeline, max(20, console.width - margin))):
        line = Text(f"rank {rank}".ljust(margin))
        for characters, part in row:
            line.append(characters, STYLES[part][0])
            seen.add(part)
        console.print(line, no_wrap=True, crop=True)
    legend = [Text(name, style) for part, (style, name) in STYLES.items() if part in seen]
    console.print(Text("  ").join(legend))
    console.print()


def print_comparison(console: Console, summary: ScheduleSummary, table: PipelineSchedule, times: PassTimes) -> None:
    """Print the figures of this schedule, and of the others at the same ranks, micro-batches and times."""
    from rich.table import Table

    from abyssal.plan.schedules import SCHEDULES
    from abyssal.plan.schedules.summary import compare_schedules

    others, refused = compare_schedules(table.num_ranks, table.micro_batches, times)
    rows = [summary, *(other for other in others if other.name != summary.name)]
    grid = Table(box=None, pad_edge=False)
    grid.add_column("", no_wrap=True)
    for heading in ("stages", "step", "bubble", "closed form", "", "weights", "activations"):
        grid.add_column(heading, justify="left" if heading == "closed form" else "right")
    for row in rows:
        named = SCHEDULES[row.name]
        grid.add_row(
            named.title,
            str(row.stages),
            f"{row.makespan:.6g}",
            f"{row.bubble:.6g} ({row.bubble / row.makespan:.1%})",
            named.bubble_formula,
            f"{row.closed_bubble:.6g}",
            f"{row.weights:g}×",
            f"{row.activations:g}",
            style="bold" if row is summary else "",
        )
    console.print(grid)
    console.print(
        f"times: F = {times.forward:g}, B = {times.backward:g}, W = {times.backward_weight:g}, F&B = {times.pair:g} "
        f"for 1/P of the model, P = {table.num_ranks} ranks; bubble: idle time of the rank that waits longest; "
        "weights: of 1/P of the model; activations: of 1/P of the model, one micro-batch, on the rank that holds most",
        style="dim",
    )
    for reason in refused.values():
        console.print(f"left out: {reason}", style="dim", markup=False)
