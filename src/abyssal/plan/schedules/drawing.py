"""A timeline as boxes for a picture, as rows of characters for a terminal, and as a trace for Perfetto."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from abyssal.plan.schedules.schedule import OverlappedPair
from abyssal.plan.schedules.simulate import IDLE, PAIR, Timeline, part_of

#: How a terminal shows each part of a rank's time: the first column of a cell, and the rest of it.
LETTERS = {PAIR: "&", IDLE: "·"}
REST = "-"


@dataclass(frozen=True, slots=True)
class ActionBox:
    """One action in a picture: its rank's row, its times, what it is, and the number written into it.

    `lane` is 0 for the whole height of the row; the two actions of a pair share it, 1 above and 2 below.
    """

    row: int
    start: float
    end: float
    kind: str
    label: str
    hint: str
    lane: int
    direction: int


def boxes(timeline: Timeline) -> list[ActionBox]:
    """Return a timeline's actions as boxes, rank by rank in order."""
    return [
        ActionBox(
            row=rank,
            start=span.start,
            end=span.end,
            kind=action.kind.value,
            label=str(action.micro_batch),
            hint=f"{span.cell} on rank {rank}: {span.start:.6g} to {span.end:.6g}",
            lane=lane if isinstance(span.cell, OverlappedPair) else 0,
            direction=action.direction,
        )
        for rank, spans in enumerate(timeline.ranks)
        for span in spans
        for lane, action in enumerate(span.cell.actions, 1)
    ]


def text_rows(timeline: Timeline, columns: int) -> list[list[tuple[str, str]]]:
    """Return each rank's time as pieces (characters, part), `columns` characters in all or fewer.

    A cell is its letter and dashes, a pair `&` and dashes, idle time dots. Where a unit of time fits into whole columns
    it takes a whole number of them; otherwise a column shows the cell in its middle.
    """
    if timeline.makespan <= 0:
        return [[] for _ in timeline.ranks]
    scale = columns / timeline.makespan
    if scale >= 1:
        scale = int(scale)
    width = min(columns, round(timeline.makespan * scale))
    rows = []
    for spans in timeline.ranks:
        characters, parts = [LETTERS[IDLE]] * width, [IDLE] * width
        for span in spans:
            part = part_of(span.cell)
            first, end = round(span.start * scale), min(width, round(span.end * scale))
            for column in range(first, end):
                characters[column] = LETTERS.get(part, part) if column == first else REST
                parts[column] = part
        pairs = zip(characters, parts, strict=True)
        rows.append(
            [("".join(character for character, _ in run), part) for part, run in groupby(pairs, lambda pair: pair[1])]
        )
    return rows


def trace(timeline: Timeline, seconds: float = 1.0) -> dict[str, Any]:
    """Return a timeline in the Trace Event Format, which ui.perfetto.dev opens: a track a rank, a slice a cell.

    `seconds` is what one unit of the timeline's times lasts.
    """
    microseconds = 1e6 * seconds
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": timeline.schedule.name}}
    ]
    for rank, spans in enumerate(timeline.ranks):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}})
        events += [
            {
                "ph": "X",
                "name": str(span.cell),
                "cat": part_of(span.cell),
                "pid": 0,
                "tid": rank,
                "ts": span.start * microseconds,
                "dur": (span.end - span.start) * microseconds,
                "args": {
                    action.kind.name.lower(): f"stage {action.stage}, micro-batch {action.micro_batch}"
                    for action in span.cell.actions
                },
            }
            for span in spans
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
