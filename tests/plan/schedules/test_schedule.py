"""Tables of pipeline schedules: complete, on the right ranks, without deadlock, as published, as torch has them."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.errors import UsageError
from abyssal.plan.schedules import (
    SCHEDULES,
    Action,
    ActionKind,
    OverlappedPair,
    PipelineSchedule,
    ScheduleError,
    build_schedule,
    check_schedule,
)


@st.composite
def schedules(draw):
    """Any schedule on few ranks; 1F1B and ZB1P also with fewer micro-batches than ranks."""
    name = draw(st.sampled_from(list(SCHEDULES)))
    ranks, extra = draw(st.integers(1, 6)), draw(st.integers(0, 9))
    if name == "interleaved":
        return build_schedule(name, ranks, ranks * draw(st.integers(1, 3)), draw(st.integers(2, 4)))
    if name == "dualpipe":
        return build_schedule(name, 2 * ranks, 4 * ranks + 2 * extra)
    if name == "dualpipev":
        return build_schedule(name, ranks, 2 * ranks + extra)
    return build_schedule(name, ranks, 1 + extra)


def kinds(schedule, rank):
    """A rank's cells as a string, & for a pair."""
    return "".join("&" if isinstance(cell, OverlappedPair) else cell.kind.value for cell in schedule.ranks[rank])


@settings(deadline=None)
@given(schedules())
def test_every_schedule_does_all_its_work_once_and_never_deadlocks(schedule):
    check_schedule(schedule)
    passes = Counter(
        (action.kind in (ActionKind.FORWARD,), action.stage, action.micro_batch)
        for cells in schedule.ranks
        for cell in cells
        for action in cell.actions
        if action.kind is not ActionKind.BACKWARD_WEIGHT
    )
    assert len(passes) == 2 * schedule.num_stages * schedule.micro_batches
    assert set(passes.values()) == {1}


@settings(deadline=None)
@given(schedules())
def test_order_respects_dependencies_and_the_order_of_each_rank(schedule):
    position = Counter()
    done = set()  # (stage, micro-batch, what): an independent reading of what a pass needs
    last = schedule.num_stages - 1
    for step in schedule.order:
        assert step.cell is schedule.ranks[step.rank][position[step.rank]]
        position[step.rank] += 1
        for action in step.cell.actions:
            stage, micro_batch = action.stage, action.micro_batch
            if action.kind is ActionKind.FORWARD:
                assert stage == 0 or (stage - 1, micro_batch, "forward") in done
            elif action.kind is ActionKind.BACKWARD_WEIGHT:
                assert (stage, micro_batch, "backward") in done
            else:
                assert (stage, micro_batch, "forward") in done
                assert stage == last or (stage + 1, micro_batch, "backward") in done
        for action in step.cell.actions:
            if action.kind is not ActionKind.BACKWARD_WEIGHT:
                what = "forward" if action.kind is ActionKind.FORWARD else "backward"
                done.add((action.stage, action.micro_batch, what))
    assert [position[rank] for rank in range(schedule.num_ranks)] == [len(cells) for cells in schedule.ranks]


@settings(deadline=None)
@given(schedules())
def test_every_message_sent_is_received_by_the_rank_it_is_for(schedule):
    sent, received = Counter(), Counter()
    for rank, cells in enumerate(schedule.ranks):
        for cell in cells:
            assert {message.source for message in schedule.sends(cell)} <= {rank}
            assert {message.target for message in schedule.receives(cell)} <= {rank}
            sent.update(schedule.sends(cell))
            received.update(schedule.receives(cell))
    assert sent == received
    assert set(sent.values()) <= {1}
    borders = sum(a != b for ranks in schedule.placement for a, b in pairwise(ranks))
    assert len(sent) == 2 * borders * schedule.micro_batches // len(schedule.placement)
    if schedule.name != "interleaved":  # there the last rank also speaks with the first
        assert {abs(message.source - message.target) for message in sent} <= {1}


# Where stages live


def test_dualpipe_holds_stages_r_and_from_the_other_end_in_opposite_directions():
    schedule = build_schedule("dualpipe", 6, 14)
    assert schedule.stages == tuple(tuple(sorted(((rank, 0), (5 - rank, 1)))) for rank in range(6))
    assert [schedule.direction_of(micro_batch) for micro_batch in range(14)] == [0] * 7 + [1] * 7


def test_dualpipe_v_holds_the_two_stages_of_a_v():
    schedule = build_schedule("dualpipev", 5, 11)
    assert schedule.stages == tuple(((rank, 0), (9 - rank, 0)) for rank in range(5))


def test_interleaved_holds_every_so_many_stages():
    schedule = build_schedule("interleaved", 3, 6, 4)
    assert schedule.stages == tuple(tuple((rank + 3 * turn, 0) for turn in range(4)) for rank in range(3))


# As published


def test_dualpipe_has_the_phases_of_the_published_example():
    # Figure 5 of the report: 8 ranks, 20 micro-batches, ten in each direction
    schedule = build_schedule("dualpipe", 8, 20)
    assert kinds(schedule, 0) == "FFFFFFFF" + "IWF" * 3 + "&" * 6 + "B&" * 3 + "BI" + "WI" * 3 + "W"
    assert kinds(schedule, 3) == "F" * 8 + "FB" + "&" * 11 + "BBBB" + "IIII" + "WWWW"
    assert " ".join(map(str, schedule.ranks[0][:8])) == "0F0 0F1 0F2 0F3 0F4 0F5 0F6 7F10"
    assert str(schedule.ranks[0][17]) == "0F7&7B13"
    mirrored = {0: 1, 1: 0}
    for rank in range(4):
        turned = [
            [(a.kind, a.stage, (a.micro_batch + 10) % 20, mirrored[a.direction]) for a in cell.actions]
            for cell in schedule.ranks[7 - rank]
        ]
        own = [[(a.kind, a.stage, a.micro_batch, a.direction) for a in cell.actions] for cell in schedule.ranks[rank]]
        assert own == turned


@pytest.mark.parametrize(("rank", "pairs"), [(0, 2 * 45 + 7), (7, 2 * 52 - 1), (8, 2 * 52 - 1), (15, 2 * 45 + 7)])
def test_dualpipe_overlaps_as_many_pairs_as_at_the_published_size(rank, pairs):
    # 16 ranks, 120 micro-batches: 103 pairs on the ranks in the middle
    assert kinds(build_schedule("dualpipe", 16, 120), rank).count("&") == pairs


def test_zb1p_is_the_published_example():
    # Qi et al., the schedule with the memory of 1F1B: 4 ranks, 8 micro-batches
    schedule = build_schedule("zb1p", 4, 8)
    assert kinds(schedule, 0) == "FFF" + "FIW" * 5 + "IW" * 3
    assert kinds(schedule, 2) == "F" + "FI" * 2 + "FIW" * 5 + "IW" + "WW"
    assert kinds(schedule, 3) == "FI" * 3 + "FIW" * 5 + "WWW"


# As torch has them


def torch_table(name, ranks, micro_batches, stages_per_rank):
    """The passes of torch's schedule in the notation of ours, which is torch's but for pairs."""
    visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")
    table = visualizer.get_schedule_ops(name, ranks, micro_batches, stages_per_rank)

    def passes(action):
        return action is not None and action.is_compute_op  # 1F1B's also has the sum of gradients at the end

    return [["&".join(map(str, action.sub_actions or [action])) for action in row if passes(action)] for row in table]


def own_table(name, *sizes):
    return [[str(cell) for cell in row] for row in build_schedule(name, *sizes).ranks]


@pytest.mark.parametrize("sizes", [(1, 2), (2, 4), (3, 11), (4, 8), (8, 40)])
def test_dualpipe_v_is_that_of_torch(sizes):
    assert own_table("dualpipev", *sizes) == torch_table("DualPipeV", *sizes, 2)


@pytest.mark.parametrize("sizes", [(2, 4, 2), (3, 6, 4), (4, 12, 3), (8, 16, 2)])
def test_interleaved_is_that_of_torch(sizes):
    assert own_table("interleaved", *sizes) == torch_table("Interleaved1F1B", *sizes)


@pytest.mark.parametrize("sizes", [(2, 3), (4, 4), (5, 12)])
def test_1f1b_is_that_of_torch_but_on_the_last_rank(sizes):
    # there torch 2.13 numbers the forward passes from 1, so that the last one is of no micro-batch
    assert own_table("1f1b", *sizes)[:-1] == torch_table("1F1B", *sizes, 1)[:-1]


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb1p", "dualpipev"])
def test_torch_finds_the_tables_whose_micro_batches_go_one_way_executable(name):
    torch = pytest.importorskip("torch.distributed.pipelining.schedules")
    schedule = build_schedule(name, 4, 8)
    table = {
        rank: [torch._Action.from_str(str(action)) for cell in cells for action in cell.actions]
        for rank, cells in enumerate(schedule.ranks)
    }
    (ranks,) = schedule.placement
    assert torch._validate_schedule(table, 4, schedule.num_stages, 8) == dict(enumerate(ranks))
    with_messages = torch._add_send_recv(table, ranks.__getitem__, schedule.num_stages)
    sends = sum(action.computation_type.value.startswith("SEND") for row in with_messages.values() for action in row)
    assert sends == sum(len(schedule.sends(cell)) for row in schedule.ranks for cell in row)


# Tables that are wrong


def spoiled(rank, change):
    """ZB1P on 3 ranks for 4 micro-batches with the cells of one rank changed."""
    schedule = build_schedule("zb1p", 3, 4)
    cells = list(schedule.ranks[rank])
    change(cells)
    return replace(
        schedule, ranks=tuple(tuple(cells) if number == rank else row for number, row in enumerate(schedule.ranks))
    )


@pytest.mark.parametrize(
    ("rank", "change", "message"),
    [
        (1, lambda cells: cells.pop(0), "stage 1, micro-batch 0: 0 F, 0 B, 1 I, 1 W"),
        (1, lambda cells: cells.append(cells[0]), "stage 1, micro-batch 0: 2 F, 0 B, 1 I, 1 W"),
        (
            2,
            lambda cells: cells.append(Action(ActionKind.BACKWARD, 2, 3)),
            "stage 2, micro-batch 3: 1 F, 1 B, 1 I, 1 W",
        ),
        (0, lambda cells: cells.append(Action(ActionKind.FORWARD, 2, 0)), "2F0 on rank 0: rank 2 holds the stage"),
        (
            0,
            lambda cells: cells.append(Action(ActionKind.FORWARD, 3, 0)),
            "3F0 on rank 0: no such stage or micro-batch",
        ),
        (
            0,
            lambda cells: cells.append(Action(ActionKind.FORWARD, 0, 4)),
            "0F4 on rank 0: no such stage or micro-batch",
        ),
        (
            0,
            lambda cells: cells.append(Action(ActionKind.FORWARD, 0, 0, 1)),
            "0F0 on rank 0: its micro-batch goes the other",
        ),
        (
            1,
            lambda cells: cells.append(OverlappedPair(cells[0], cells[2])),
            "1F0&1I0 on rank 1: a pair is a forward and a whole",
        ),
        (2, lambda cells: cells.reverse(), "deadlock: rank 0 at 0I0 waits for the input gradient of stage 1"),
    ],
)
def test_a_wrong_table_is_found(rank, change, message):
    with pytest.raises(ScheduleError, match=message):
        check_schedule(spoiled(rank, change))


def test_a_pair_whose_halves_wait_for_each_other_deadlocks():
    pair = OverlappedPair(Action(ActionKind.FORWARD, 0, 0), Action(ActionKind.BACKWARD, 0, 0))
    with pytest.raises(ScheduleError, match="deadlock: rank 0 at 0F0&0B0 waits for the output of stage 0"):
        check_schedule(PipelineSchedule("self", 1, ((0,),), ((pair,),)))


# Sizes that a schedule does not take


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("dualpipe", 8, 19),
            "micro_batches=19: DualPipe takes an even number, at least 2 [*] ranks = 16; nearest: 18, 20",
        ),
        (("dualpipe", 8, 14), "micro_batches=14: .*; nearest: 16$"),
        (("dualpipe", 8, 15), "micro_batches=15: .*; nearest: 16$"),
        (("dualpipe", 5, 20), "ranks=5: DualPipe takes an even number; nearest: 4, 6"),
        (("dualpipe", 1, 20), "ranks=1: .*; nearest: 2$"),
        (("dualpipev", 4, 7), "micro_batches=7: DualPipeV takes at least 2 [*] ranks = 8; nearest: 8"),
        (("interleaved", 4, 9), "micro_batches=9: interleaved 1F1B takes a multiple of ranks=4; nearest: 8, 12"),
        (("interleaved", 4, 3), "micro_batches=3: .*; nearest: 4$"),
        (("interleaved", 4, 8, 1), "stages_per_rank=1: interleaved 1F1B takes at least 2; 1f1b has one"),
        (("zb1p", 4, 8, 2), "stages_per_rank=2: only the schedule interleaved takes it, not zb1p"),
        (("1f1b", 0, 8), "ranks=0: must be at least 1"),
        (("zb1p", 4096, 8192), "ranks=4096, micro_batches=8192: 33,554,432 chunks are more than the 500,000"),
        (("interleaved", 10, 1000, 60), "ranks=10, micro_batches=1000: 600,000 chunks are more than"),
        (("zb1p", 4, -1), "micro_batches=-1: must be at least 1"),
        (("dualpip", 4, 8), "schedule dualpip: must be one of 1f1b, .*; nearest: dualpipe$"),
    ],
)
def test_sizes_are_refused_with_the_nearest_that_are_taken(arguments, message):
    with pytest.raises(UsageError, match=message):
        build_schedule(*arguments)


@settings(deadline=None)
@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 9), st.integers(1, 40))
def test_the_nearest_sizes_are_taken(name, ranks, micro_batches):
    sizes = {"ranks": ranks, "micro_batches": micro_batches}
    try:
        build_schedule(name, **sizes)
    except UsageError as error:
        field = str(error).partition("=")[0]
        for value in str(error).rpartition("nearest: ")[2].split(", "):
            nearest = sizes | {field: int(value)}
            if field == "ranks":  # then the micro-batches may be refused in their turn, but for themselves
                nearest["micro_batches"] = 40
            build_schedule(name, **nearest)
