"""Timelines as boxes, as text and as a trace."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.plan.schedules import OverlappedPair, PassCosts, boxes, build_schedule, simulate, text_rows, trace


@pytest.fixture
def timeline():
    return simulate(build_schedule("dualpipe", 4, 10), PassCosts(1.0, 1.5, 0.75))


def test_every_action_is_a_box_and_the_two_of_a_pair_share_a_row(timeline):
    found = boxes(timeline)
    spans = [(rank, span) for rank, row in enumerate(timeline.ranks) for span in row]
    assert len(found) == sum(len(span.cell.actions) for _, span in spans)
    whole = [box for box in found if box.lane == 0]
    assert len(whole) == sum(not isinstance(span.cell, OverlappedPair) for _, span in spans)
    above, below = ([box for box in found if box.lane == lane] for lane in (1, 2))
    assert [(box.row, box.start, box.end) for box in above] == [(box.row, box.start, box.end) for box in below]
    assert {box.kind for box in above} == {"F"}
    assert {box.kind for box in below} == {"B"}
    assert {box.label for box in found if box.direction == 1} == {str(number) for number in range(5, 10)}


def test_text_at_whole_columns_is_the_table_itself():
    timeline = simulate(build_schedule("zb1p", 3, 3), PassCosts())
    rows = ["".join(text for text, _ in row) for row in text_rows(timeline, 23)]
    assert rows == ["F-F-F-····I-W-I-W-I-W-", "··F-F-··I-F-I-W-I-W-W-", "····F-I-F-I-F-I-W-W-W-"]


@settings(deadline=None)
@given(st.integers(1, 200), st.sampled_from(["1f1b", "zb1p", "dualpipev"]))
def test_text_fills_the_width_and_names_the_part_of_each_piece(columns, name):
    timeline = simulate(build_schedule(name, 3, 7), PassCosts(1.0, 1.25, 0.5))
    for rank, row in enumerate(text_rows(timeline, columns)):
        width = sum(len(text) for text, _ in row)
        assert width <= columns
        assert width >= min(columns, timeline.makespan) - 1
        for part in {part for _, part in row}:
            shown = sum(len(text) for text, name in row if name == part)
            exact = timeline.parts(rank)[part] / timeline.makespan * width
            assert abs(shown - exact) <= len(timeline.ranks[rank]) + 1


def test_text_of_nothing_is_empty():
    timeline = simulate(build_schedule("1f1b", 2, 3), lambda cell: 0.0)
    assert text_rows(timeline, 80) == [[], []]


def test_trace_has_a_track_a_rank_and_a_slice_a_cell(timeline):
    events = json.loads(json.dumps(trace(timeline, seconds=0.5)))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {rank: f"rank {rank}" for rank in range(4)}
    for rank, spans in enumerate(timeline.ranks):
        slices = [event for event in events if event["ph"] == "X" and event["tid"] == rank]
        assert [event["name"] for event in slices] == [str(span.cell) for span in spans]
        assert [event["ts"] for event in slices] == pytest.approx([5e5 * span.start for span in spans])
        assert [event["dur"] for event in slices] == pytest.approx([5e5 * (span.end - span.start) for span in spans])
    assert {event["cat"] for event in events if event["ph"] == "X"} == {"F", "B", "I", "W", "F&B"}
