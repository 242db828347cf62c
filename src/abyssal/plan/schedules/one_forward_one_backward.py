"""1F1B, and its interleaved form with several stages a rank."""

from __future__ import annotations

from abyssal.errors import UsageError
from abyssal.plan.schedules.schedule import Action, ActionKind, Cell, PipelineSchedule
from abyssal.plan.schedules.sizes import check_sizes, refuse_micro_batches


def one_forward_one_backward(ranks: int, micro_batches: int) -> PipelineSchedule:
    """Return 1F1B: rank r does ranks - 1 - r forward passes, then alternates, so it holds few activations.

    Any number of micro-batches will do. Paper: Narayanan et al., PipeDream-Flush (2006.09503).
    """
    check_sizes(ranks, micro_batches)
    tables = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        cells: list[Cell] = [Action(ActionKind.FORWARD, rank, micro_batch) for micro_batch in range(ahead)]
        for micro_batch in range(micro_batches):
            if micro_batch + ahead < micro_batches:
                cells.append(Action(ActionKind.FORWARD, rank, micro_batch + ahead))
            cells.append(Action(ActionKind.BACKWARD, rank, micro_batch))
        tables.append(tuple(cells))
    return PipelineSchedule("1f1b", micro_batches, (tuple(range(ranks)),), tuple(tables))


def interleaved(ranks: int, micro_batches: int, stages_per_rank: int = 2) -> PipelineSchedule:
    """Return interleaved 1F1B: rank r holds stages r, r + ranks, r + 2 ranks, ...

    Micro-batches go in groups of `ranks` through a rank's first stage, then its second, and so on; backward passes in
    the same groups from its last stage to its first. Paper: Narayanan et al., Megatron-LM (2104.04473), §2.2.

    Raises:
        UsageError: the micro-batches are no multiple of the ranks, or a rank has a single stage.
    """
    if stages_per_rank < 2:
        raise UsageError(f"stages_per_rank={stages_per_rank}: interleaved 1F1B takes at least 2; 1f1b has one")
    check_sizes(ranks, micro_batches, stages_per_rank)
    if micro_batches % ranks:
        below = micro_batches // ranks * ranks
        refuse_micro_batches(
            micro_batches, f"interleaved 1F1B takes a multiple of ranks={ranks}", (below, below + ranks)
        )
    stages, passes = ranks * stages_per_rank, micro_batches * stages_per_rank

    def nth(kind: ActionKind, rank: int, number: int) -> Action:
        """Return a rank's forward or backward pass by its number in the order of groups."""
        group, within = divmod(number, stages)
        turn, place = divmod(within, ranks)
        turn = turn if kind is ActionKind.FORWARD else stages_per_rank - 1 - turn
        return Action(kind, rank + turn * ranks, group * ranks + place)

    tables = []
    for rank in range(ranks):
        ahead = min(2 * (ranks - 1 - rank) + (stages_per_rank - 1) * ranks, passes)
        cells: list[Cell] = [nth(ActionKind.FORWARD, rank, number) for number in range(ahead)]
        for number in range(passes):
            if number + ahead < passes:
                cells.append(nth(ActionKind.FORWARD, rank, number + ahead))
            cells.append(nth(ActionKind.BACKWARD, rank, number))
        tables.append(tuple(cells))
    placement = tuple(stage % ranks for stage in range(stages))
    return PipelineSchedule("interleaved", micro_batches, (placement,), tuple(tables))
