"""When each action of a schedule begins and ends, how long ranks are idle, and how many activations they hold.

Unit of time: that of the costs. A rank executes its cells in order, one at a time; a message travels beside the
computation, and links are never contended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from abyssal.plan.schedules.schedule import ActionKind, Cell, OverlappedPair, PipelineSchedule

#: The time of one cell: any function of its actions' kinds, stages, micro-batches.
TimeOf = Callable[[Cell], float]
#: The time of a message from one rank to another.
TransferTime = Callable[[int, int], float]

PAIR, IDLE = "F&B", "idle"
#: The parts of a rank's time, in the order in which they are shown.
PARTS = (*(kind.value for kind in ActionKind), PAIR)


@dataclass(frozen=True)
class PassCosts:
    """The time of each kind of pass: a number for all stages, or one for each stage.

    A whole backward pass takes `backward_input + backward_weight`. `overlapped(forward_stage, backward_stage)` is the
    time of a pair; without it the two passes take their sum, as if nothing were overlapped.
    """

    forward: float | Sequence[float] = 1.0
    backward_input: float | Sequence[float] = 1.0
    backward_weight: float | Sequence[float] = 1.0
    overlapped: Callable[[int, int], float] | None = None

    def __call__(self, cell: Cell) -> float:
        """Return the time of a cell."""
        if isinstance(cell, OverlappedPair):
            if self.overlapped is not None:
                return self.overlapped(cell.forward.stage, cell.backward.stage)
            return self(cell.forward) + self(cell.backward)
        match cell.kind:
            case ActionKind.FORWARD:
                return _at(self.forward, cell.stage)
            case ActionKind.BACKWARD_INPUT:
                return _at(self.backward_input, cell.stage)
            case ActionKind.BACKWARD_WEIGHT:
                return _at(self.backward_weight, cell.stage)
            case ActionKind.BACKWARD:
                return _at(self.backward_input, cell.stage) + _at(self.backward_weight, cell.stage)


def part_of(cell: Cell) -> str:
    """Return which part of a rank's time a cell belongs to: F, B, I, W or F&B."""
    return PAIR if isinstance(cell, OverlappedPair) else cell.kind.value


def _at(cost: float | Sequence[float], stage: int) -> float:
    return cost[stage] if isinstance(cost, Sequence) else cost


@dataclass(frozen=True, slots=True)
class TimedCell:
    """A cell with the times between which it is executed."""

    cell: Cell
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule in time: `ranks[rank]` are its cells with their times, in order."""

    schedule: PipelineSchedule
    ranks: tuple[tuple[TimedCell, ...], ...]

    @cached_property
    def makespan(self) -> float:
        """From the first cell's start, which is 0, to the last one's end on any rank."""
        return max((spans[-1].end for spans in self.ranks if spans), default=0.0)

    def busy(self, rank: int) -> float:
        """Return how long a rank computes."""
        return sum(span.end - span.start for span in self.ranks[rank])

    def idle(self, rank: int) -> float:
        """Return how long a rank waits within the makespan, before, between and after its cells."""
        return self.makespan - self.busy(rank)

    @property
    def bubble(self) -> float:
        """The idle time of the rank that waits longest."""
        return max(self.idle(rank) for rank in range(len(self.ranks)))

    def parts(self, rank: int) -> dict[str, float]:
        """Return what a rank's makespan goes to: F, B, I, W, F&B and idle."""
        parts = dict.fromkeys(PARTS, 0.0)
        for span in self.ranks[rank]:
            parts[part_of(span.cell)] += span.end - span.start
        return parts | {IDLE: self.idle(rank)}


def simulate(schedule: PipelineSchedule, time_of: TimeOf, transfer: TransferTime | None = None) -> Timeline:
    """Execute a schedule with given times: each cell starts when its rank is free and all that it needs has arrived.

    Args:
        schedule: the table.
        time_of: the time of each cell; `PassCosts` is one such function.
        transfer: the time of a message from rank to rank; none takes any without it.

    Raises:
        ScheduleError: the table deadlocks.
    """
    free = [0.0] * schedule.num_ranks
    spans: list[list[TimedCell]] = [[] for _ in schedule.ranks]
    ends: list[float] = []  # of each step
    for step in schedule.order:
        start = free[step.rank]
        for number in step.after:
            source = schedule.order[number].rank
            travel = transfer(source, step.rank) if transfer and source != step.rank else 0.0
            start = max(start, ends[number] + travel)
        end = free[step.rank] = start + time_of(step.cell)
        ends.append(end)
        spans[step.rank].append(TimedCell(step.cell, start, end))
    return Timeline(schedule, tuple(tuple(row) for row in spans))


def peak_activations(
    schedule: PipelineSchedule, rank: int, *, size: Mapping[int, float] | None = None, kept_for_weight: float = 1.0
) -> float:
    """Return the most activations that a rank holds at once, in chunks, or in the unit of `size`, a value a stage.

    A forward pass adds its chunk; the backward pass, or its weight half, takes it away when it ends. Between the two
    halves `kept_for_weight` of it is still held. In a pair both chunks are held together.
    """
    held = most = 0.0
    for cell in schedule.ranks[rank]:
        for action in cell.actions:
            if action.kind is ActionKind.FORWARD:
                held += size[action.stage] if size else 1.0
        most = max(most, held)
        for action in cell.actions:
            released = {
                ActionKind.FORWARD: 0.0,
                ActionKind.BACKWARD: 1.0,
                ActionKind.BACKWARD_INPUT: 1.0 - kept_for_weight,
                ActionKind.BACKWARD_WEIGHT: kept_for_weight,
            }
            held -= released[action.kind] * (size[action.stage] if size else 1.0)
    return most
