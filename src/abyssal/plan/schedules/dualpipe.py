"""DualPipe, which feeds a pipeline from both ends, and DualPipeV, which is one half of it folded into a V.

Both give a rank an early stage h and the late stage S - 1 - h of S, and the rank follows the same eight phases,
whichever way its micro-batches came. Paper: §3.2.1, Figure 5.
"""

from __future__ import annotations

from collections import deque

from abyssal.errors import UsageError
from abyssal.plan.schedules.schedule import Action, ActionKind, Cell, OverlappedPair, PipelineSchedule
from abyssal.plan.schedules.sizes import check_sizes, refuse_micro_batches


def dualpipe(ranks: int, micro_batches: int) -> PipelineSchedule:
    """Return DualPipe: as many stages as ranks, rank r with stages r and ranks - 1 - r.

    The first half of the micro-batches enters at rank 0 and travels up, the second enters at the last rank and travels
    down; each direction has weights of its own, whose gradients are summed at the end of the step.

    Raises:
        UsageError: the ranks are odd, or the micro-batches are odd or fewer than twice the ranks.
    """
    check_sizes(ranks, micro_batches)
    if ranks % 2:
        raise UsageError(f"ranks={ranks}: DualPipe takes an even number; nearest: {_nearest_even(ranks, 2)}")
    if micro_batches % 2 or micro_batches < 2 * ranks:
        rule = f"DualPipe takes an even number, at least 2 * ranks = {2 * ranks}"
        nearest = (2 * ranks,) if micro_batches < 2 * ranks else (micro_batches - 1, micro_batches + 1)
        refuse_micro_batches(micro_batches, rule, nearest)
    half = micro_batches // 2
    tables = []
    for rank in range(ranks):
        direction = int(rank >= ranks // 2)  # the way in which this rank's stage is among the first
        depth = min(rank, ranks - 1 - rank)
        early = _Lane(depth, direction, direction * half)
        late = _Lane(ranks - 1 - depth, 1 - direction, (1 - direction) * half)
        tables.append(tuple(_eight_phases(early, late, ranks, half)))
    up = tuple(range(ranks))
    return PipelineSchedule("dualpipe", micro_batches, (up, up[::-1]), tuple(tables))


def dualpipe_v(ranks: int, micro_batches: int) -> PipelineSchedule:
    """Return DualPipeV: twice as many stages as ranks, rank r with stages r and 2 ranks - 1 - r; all go one way.

    Raises:
        UsageError: the micro-batches are fewer than the stages.
    """
    check_sizes(ranks, micro_batches)
    stages = 2 * ranks
    if micro_batches < stages:
        refuse_micro_batches(micro_batches, f"DualPipeV takes at least 2 * ranks = {stages}", (stages,))
    tables = [
        tuple(_eight_phases(_Lane(rank, 0, 0), _Lane(stages - 1 - rank, 0, 0), stages, micro_batches))
        for rank in range(ranks)
    ]
    placement = tuple(min(stage, stages - 1 - stage) for stage in range(stages))
    return PipelineSchedule("dualpipev", micro_batches, (placement,), tuple(tables))


class _Lane:
    """One of a rank's two stages: hands out its next forward and its next backward pass, in order of micro-batches."""

    def __init__(self, stage: int, direction: int, first: int) -> None:
        self.stage, self.direction = stage, direction
        self._forward = self._backward = first

    def forward(self) -> Action:
        self._forward += 1
        return Action(ActionKind.FORWARD, self.stage, self._forward - 1, self.direction)

    def backward(self, kind: ActionKind = ActionKind.BACKWARD) -> Action:
        self._backward += 1
        return Action(kind, self.stage, self._backward - 1, self.direction)


def _eight_phases(early: _Lane, late: _Lane, stages: int, micro_batches: int) -> list[Cell]:
    """Return the cells of the rank that holds the stages of two lanes, with `micro_batches` passing each.

    In the names of the phases, 0 is the early stage and 1 the late one.
    """
    depth = early.stage
    to_fold = stages // 2 - 1 - depth  # how many ranks stand between this one and the innermost
    cells: list[Cell] = []
    put_off: deque[Action] = deque()  # chunks whose weight gradient is still to come

    def backward_input(lane: _Lane) -> None:
        cells.append(action := lane.backward(ActionKind.BACKWARD_INPUT))
        put_off.append(action)

    def backward_weight() -> None:
        chunk = put_off.popleft()
        cells.append(Action(ActionKind.BACKWARD_WEIGHT, chunk.stage, chunk.micro_batch, chunk.direction))

    for _ in range(2 * to_fold):  # 1: F0
        cells.append(early.forward())
    for _ in range(depth + 1):  # 2: F0 F1
        cells += [early.forward(), late.forward()]
    for _ in range(to_fold):  # 3: I1 W1 F1
        backward_input(late)
        backward_weight()
        cells.append(late.forward())
    for turn in range(micro_batches - stages + depth + 1):  # 4, most of the time: F0&B1 F1&B0
        if turn == 0 and to_fold == 0:
            # the innermost ranks wait for each other here: apart, the forward pass need not wait for the backward one
            cells += [early.forward(), late.backward()]
        else:
            cells.append(OverlappedPair(early.forward(), late.backward()))
        cells.append(OverlappedPair(late.forward(), early.backward()))
    for _ in range(to_fold):  # 5: B1 F1&B0
        cells.append(late.backward())
        cells.append(OverlappedPair(late.forward(), early.backward()))
    for number in range(2 * (depth + 1)):  # 6: B1 B0, the second half of them split
        lane = early if number % 2 else late
        if number <= depth:
            cells.append(lane.backward())
        else:
            backward_input(lane)
    for _ in range(to_fold):  # 7: W I0
        backward_weight()
        backward_input(early)
    while put_off:  # 8: W
        backward_weight()
    return cells


def _nearest_even(number: int, least: int) -> str:
    return ", ".join(str(even) for even in (number - 1, number + 1) if even >= least)
