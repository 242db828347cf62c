"""Whether a table is a schedule: complete, on the right ranks, and free of deadlock."""

from __future__ import annotations

from collections import Counter

from abyssal.plan.schedules.schedule import ActionKind, OverlappedPair, PipelineSchedule, ScheduleError

PAIRED = [ActionKind.FORWARD, ActionKind.BACKWARD]


def check_schedule(schedule: PipelineSchedule) -> None:
    """Raise ScheduleError unless the table can be executed and does all its work once.

    Every chunk has one forward pass and either one whole backward pass or one of each half, on the rank that holds its
    stage, in the direction of its micro-batch; and an order exists in which every action has what it needs.
    """
    counts: Counter[tuple[int, int, ActionKind]] = Counter()
    for rank, cells in enumerate(schedule.ranks):
        for cell in cells:
            if isinstance(cell, OverlappedPair) and [action.kind for action in cell.actions] != PAIRED:
                raise ScheduleError(f"{cell} on rank {rank}: a pair is a forward and a whole backward pass")
            for action in cell.actions:
                if not (0 <= action.stage < schedule.num_stages and 0 <= action.micro_batch < schedule.micro_batches):
                    raise ScheduleError(f"{action} on rank {rank}: no such stage or micro-batch")
                if action.direction != schedule.direction_of(action.micro_batch):
                    raise ScheduleError(f"{action} on rank {rank}: its micro-batch goes the other way")
                if (holder := schedule.rank_of(action.result)) != rank:
                    raise ScheduleError(f"{action} on rank {rank}: rank {holder} holds the stage")
                counts[action.stage, action.micro_batch, action.kind] += 1
    complete = ((1, 1, 0, 0), (1, 0, 1, 1))  # of F, B, I, W
    for stage in range(schedule.num_stages):
        for micro_batch in range(schedule.micro_batches):
            of_chunk = tuple(counts[stage, micro_batch, kind] for kind in ActionKind)
            if of_chunk not in complete:
                passes = ", ".join(f"{count} {kind}" for count, kind in zip(of_chunk, ActionKind, strict=True))
                raise ScheduleError(f"stage {stage}, micro-batch {micro_batch}: {passes}")
    _ = schedule.order  # raises on a deadlock
