"""ZB1P: 1F1B whose backward passes are split, so that weight gradients fill the bubble at the end."""

from __future__ import annotations

from abyssal.plan.schedules.schedule import Action, ActionKind, Cell, PipelineSchedule
from abyssal.plan.schedules.sizes import check_sizes


def zb1p(ranks: int, micro_batches: int) -> PipelineSchedule:
    """Return ZB1P: as 1F1B, but rank r puts each weight gradient off until r more input gradients are done.

    Input gradients so reach the ranks before sooner, and no rank holds more than `ranks` activations. Any number of
    micro-batches will do. Paper: Qi et al. (2401.10241), §2.2, there ZB-H1.
    """
    check_sizes(ranks, micro_batches)
    tables = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        cells: list[Cell] = [Action(ActionKind.FORWARD, rank, micro_batch) for micro_batch in range(ahead)]
        for micro_batch in range(micro_batches):
            if micro_batch + ahead < micro_batches:
                cells.append(Action(ActionKind.FORWARD, rank, micro_batch + ahead))
            cells.append(Action(ActionKind.BACKWARD_INPUT, rank, micro_batch))
            if micro_batch >= rank:
                cells.append(Action(ActionKind.BACKWARD_WEIGHT, rank, micro_batch - rank))
        left = range(max(0, micro_batches - rank), micro_batches)
        cells += [Action(ActionKind.BACKWARD_WEIGHT, rank, micro_batch) for micro_batch in left]
        tables.append(tuple(cells))
    return PipelineSchedule("zb1p", micro_batches, (tuple(range(ranks)),), tuple(tables))
