"""Simulated schedules: against a second simulation, Table 2's closed forms, and a count of what is alive."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.plan.schedules import (
    SCHEDULES,
    Action,
    ActionKind,
    OverlappedPair,
    PassCosts,
    PipelineSchedule,
    ScheduleError,
    build_schedule,
    peak_activations,
    simulate,
)
from abyssal.plan.schedules.summary import PassTimes, compare_schedules, run_schedule, summarise


def enough(name, ranks, extra):
    """A schedule with at least as many micro-batches as stages, which is what the closed forms are for."""
    if name == "dualpipe":
        return build_schedule(name, 2 * ranks, 4 * ranks + 2 * extra)
    if name == "interleaved":
        return build_schedule(name, ranks, 3 * ranks, 3)
    return build_schedule(name, ranks, 2 * ranks + extra)


any_schedule = st.builds(enough, st.sampled_from(list(SCHEDULES)), st.integers(1, 5), st.integers(0, 7))


def fixed_point(schedule, time_of, transfer):
    """End of each pass, found by raising all times until nothing moves: a longest path, without any order."""
    ends = {}
    moved = True
    while moved:
        moved = False
        for rank, cells in enumerate(schedule.ranks):
            free = 0.0
            for cell in cells:
                start = free
                for action in cell.actions:
                    stage, micro_batch, way = action.stage, action.micro_batch, schedule.placement[action.direction]
                    before = []
                    if action.kind is ActionKind.FORWARD and stage:
                        before.append(("F", stage - 1))
                    if action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT) and stage + 1 < len(way):
                        before.append(("B", stage + 1))
                    for kind, other in before:
                        arrival = ends.get((kind, other, micro_batch), 0.0)
                        arrival += transfer(way[other], rank) if way[other] != rank else 0.0
                        start = max(start, arrival)
                free = start + time_of(cell)
                for action in cell.actions:
                    kind = {ActionKind.FORWARD: "F", ActionKind.BACKWARD_WEIGHT: "W"}.get(action.kind, "B")
                    key = (kind, action.stage, action.micro_batch)
                    moved |= ends.get(key) != free
                    ends[key] = free
    return ends


@settings(max_examples=40, deadline=None)
@given(any_schedule, st.randoms(use_true_random=False))
def test_simulation_equals_the_longest_path_at_random_times(schedule, rng: random.Random):
    times = {cell: rng.randint(1, 9) for cells in schedule.ranks for cell in cells}
    ranks = range(schedule.num_ranks)
    links = {(a, b): rng.randint(0, 5) for a in ranks for b in ranks}

    def transfer(source, target):
        return links[source, target]

    timeline = simulate(schedule, times.__getitem__, transfer)
    ends = fixed_point(schedule, times.__getitem__, transfer)
    for spans in timeline.ranks:
        for span in spans:
            assert span.end - span.start == times[span.cell]
            for action in span.cell.actions:
                kind = {ActionKind.FORWARD: "F", ActionKind.BACKWARD_WEIGHT: "W"}.get(action.kind, "B")
                assert span.end == ends[kind, action.stage, action.micro_batch]
    assert timeline.makespan == max(ends.values())


@settings(deadline=None)
@given(any_schedule, st.randoms(use_true_random=False))
def test_parts_of_a_rank_s_time_add_up_to_the_makespan(schedule, rng: random.Random):
    times = {cell: rng.uniform(0.5, 2) for cells in schedule.ranks for cell in cells}
    timeline = simulate(schedule, times.__getitem__)
    idle = []
    for rank, cells in enumerate(schedule.ranks):
        parts = timeline.parts(rank)
        assert math.isclose(sum(parts.values()), timeline.makespan)
        assert math.isclose(parts["F&B"], sum(times[cell] for cell in cells if isinstance(cell, OverlappedPair)))
        idle.append(timeline.makespan - sum(times[cell] for cell in cells))
    assert math.isclose(timeline.bubble, max(idle), abs_tol=1e-9)


# Table 2


@settings(deadline=None)
@given(any_schedule, st.integers(1, 7))
def test_bubbles_are_those_of_table_2_where_forward_and_both_halves_take_the_same(schedule, unit):
    timeline = simulate(schedule, PassCosts(unit, unit, unit))
    closed = SCHEDULES[schedule.name].bubble(schedule.num_ranks, unit, 2 * unit, unit, 3 * unit)
    assert [timeline.idle(rank) for rank in range(schedule.num_ranks)] == [closed] * schedule.num_ranks


@pytest.mark.parametrize(("name", "bubble"), [("1f1b", 15 * 3), ("zb1p", 15 * 1), ("dualpipe", 7 * 2)])
def test_bubbles_of_table_2_at_16_ranks(name, bubble):
    # (PP-1)(F+B), (PP-1)(F+B-2W), (PP/2-1)(F&B+B-3W) at F = W = 1, B = 2, F&B = 3
    assert simulate(build_schedule(name, 16, 120), PassCosts()).bubble == bubble


unit = st.integers(1, 9)


def bubbles(schedule, forward, half, weight):
    """The simulated bubble, and that of Table 2."""
    backward = half + weight
    closed = SCHEDULES[schedule.name].bubble(schedule.num_ranks, forward, backward, weight, forward + backward)
    return simulate(schedule, PassCosts(forward, half, weight)).bubble, closed


@settings(deadline=None)
@given(st.sampled_from(["1f1b", "interleaved"]), st.integers(1, 5), st.integers(0, 5), unit, unit, unit)
def test_the_bubble_of_1f1b_is_the_closed_form_at_any_times(name, ranks, extra, forward, half, weight):
    simulated, closed = bubbles(enough(name, ranks, extra), forward, half, weight)
    assert simulated == closed


@settings(deadline=None)
@given(st.integers(2, 5), st.integers(0, 5), unit, unit, unit)
def test_the_bubble_of_zb1p_is_the_closed_form_where_weight_gradients_fit_into_the_gaps(
    ranks, extra, forward, half, weight
):
    simulated, closed = bubbles(enough("zb1p", ranks, extra), forward, half, weight)
    assert (simulated == closed) == (weight <= min(forward, half))
    assert simulated >= closed


@settings(deadline=None)
@given(st.sampled_from(["dualpipe", "dualpipev"]), st.integers(1, 4), st.integers(0, 5), unit, unit)
def test_the_bubble_of_dualpipe_is_the_closed_form_where_forward_and_input_half_take_the_same(
    name, ranks, extra, forward, weight
):
    simulated, closed = bubbles(enough(name, ranks, extra), forward, forward, min(weight, forward))
    assert simulated == closed


def test_the_bubble_of_dualpipe_elsewhere_is_the_longest_idle_time():
    timeline = simulate(build_schedule("dualpipe", 8, 20), PassCosts(1, 1.3, 0.6, lambda forward, backward: 2.5))
    assert [timeline.idle(rank) for rank in range(4)] == pytest.approx([6.1, 6.5, 6.9, 6.9])
    assert timeline.bubble == pytest.approx(6.9)


@settings(deadline=None)
@given(any_schedule)
def test_the_most_activations_are_those_of_table_2(schedule):
    ranks, stages = schedule.num_ranks, schedule.num_stages
    peaks = [peak_activations(schedule, rank) for rank in range(ranks)]
    assert max(peaks) == SCHEDULES[schedule.name].activations(ranks, stages)
    if schedule.name.startswith("dualpipe"):
        assert set(peaks) == {stages + 1}


@pytest.mark.parametrize(
    ("name", "weights", "activations"), [("1f1b", 1, 16), ("zb1p", 1, 16), ("dualpipe", 2, 17), ("dualpipev", 1, 16.5)]
)
def test_memory_of_table_2_at_16_ranks_in_parts_of_a_sixteenth_of_the_model(name, weights, activations):
    schedule = build_schedule(name, 16, 120)
    times = PassTimes()
    summary = summarise(run_schedule(schedule, times), times)
    assert (summary.weights, summary.activations, summary.closed_activations) == (weights, activations, activations)


@settings(deadline=None)
@given(any_schedule, st.randoms(use_true_random=False))
def test_peak_activations_are_those_alive_in_the_timeline(schedule, rng: random.Random):
    size = {stage: float(rng.randint(1, 9)) for stage in range(schedule.num_stages)}
    share = rng.choice([0.0, 0.25, 1.0])
    timeline = simulate(schedule, lambda cell: rng.uniform(0.5, 2))
    for rank, spans in enumerate(timeline.ranks):
        alive = []  # (from, to, how much)
        begun = {}
        for span in spans:
            for action in span.cell.actions:
                chunk = (action.stage, action.micro_batch)
                if action.kind is ActionKind.FORWARD:
                    begun[chunk] = span.start
                elif action.kind is ActionKind.BACKWARD_WEIGHT:
                    alive.append((begun[chunk], span.end, share * size[action.stage]))
                else:
                    part = 1 - share if action.kind is ActionKind.BACKWARD_INPUT else 1
                    alive.append((begun[chunk], span.end, part * size[action.stage]))
        most = max(sum(much for start, end, much in alive if start <= span.start < end) for span in spans)
        assert peak_activations(schedule, rank, size=size, kept_for_weight=share) == pytest.approx(most)


# Costs


def test_costs_by_stage_and_of_pairs():
    costs = PassCosts((1.0, 2.0), (3.0, 4.0), 0.5, lambda forward, backward: 100.0 + 10 * forward + backward)
    forward, backward = Action(ActionKind.FORWARD, 1, 0), Action(ActionKind.BACKWARD, 0, 0)
    assert costs(forward) == 2.0
    assert costs(backward) == 3.5
    assert costs(Action(ActionKind.BACKWARD_INPUT, 1, 0)) == 4.0
    assert costs(Action(ActionKind.BACKWARD_WEIGHT, 1, 0)) == 0.5
    assert costs(OverlappedPair(forward, backward)) == 110.0
    assert PassCosts((1.0, 2.0), (3.0, 4.0), 0.5)(OverlappedPair(forward, backward)) == 5.5


def test_overlap_shortens_a_step_and_messages_lengthen_it():
    schedule = build_schedule("dualpipe", 4, 12)
    plain = simulate(schedule, PassCosts()).makespan
    assert simulate(schedule, PassCosts(overlapped=lambda forward, backward: 2.5)).makespan < plain
    assert simulate(schedule, PassCosts(), lambda source, target: 0.5).makespan > plain


def test_a_table_that_deadlocks_is_not_simulated():
    cells = (Action(ActionKind.BACKWARD, 0, 0), Action(ActionKind.FORWARD, 0, 0))
    with pytest.raises(ScheduleError, match="deadlock: rank 0 at 0B0 waits for the output of stage 0, micro-batch 0"):
        simulate(PipelineSchedule("backwards", 1, ((0,),), (cells,)), PassCosts())


# All schedules beside one another


def test_a_rank_computes_as_long_in_every_schedule():
    times = PassTimes(forward=3, backward_input=5, backward_weight=2)
    summaries, refused = compare_schedules(4, 8, times)
    assert [summary.name for summary in summaries] == list(SCHEDULES)
    assert refused == {}
    for summary in summaries:
        assert summary.makespan - summary.bubble == pytest.approx(8 * 10)


def test_schedules_that_do_not_take_the_numbers_are_left_out_with_the_reason():
    summaries, refused = compare_schedules(5, 9, PassTimes())
    assert [summary.name for summary in summaries] == ["1f1b", "zb1p"]
    assert list(refused) == ["interleaved", "dualpipe", "dualpipev"]
    assert refused["dualpipe"].startswith("ranks=5: DualPipe takes an even number")
