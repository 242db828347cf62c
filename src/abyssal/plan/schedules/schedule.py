"""What a pipeline schedule is: for each rank an ordered list of passes over chunks, and where every stage lives.

A chunk is one stage's work on one micro-batch. The same table is checked, simulated, drawn and executed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property


class ActionKind(StrEnum):
    """What an action does with its chunk."""

    FORWARD = "F"
    BACKWARD = "B"  # the complete backward pass: the gradients of the input and of the weights
    BACKWARD_INPUT = "I"  # the input's gradient only; a BACKWARD_WEIGHT of the same chunk follows
    BACKWARD_WEIGHT = "W"


class ResultKind(StrEnum):
    """What an action leaves behind for others."""

    OUTPUT = "output"  # of a stage: the next stage's input, and what its own backward pass needs
    INPUT_GRADIENT = "input gradient"  # of a stage: the output's gradient of the stage before
    WEIGHT_GRADIENT = "weight gradient"


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """One value of one chunk; with `PipelineSchedule.route` it tells which tensor goes where."""

    value: ResultKind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        """Name it as a sentence does."""
        return f"{self.value} of stage {self.stage}, micro-batch {self.micro_batch}"


@dataclass(frozen=True, slots=True)
class Action:
    """One pass over one chunk.

    `direction` is the way the micro-batch travels: 0, or 1 for the second half of DualPipe's micro-batches, which enter
    at the last rank. A rank that holds a stage for each direction holds two sets of weights.
    """

    kind: ActionKind
    stage: int
    micro_batch: int
    direction: int = 0

    def __str__(self) -> str:
        """Name it as torch does: `3F12` is the forward pass of stage 3 over micro-batch 12."""
        return f"{self.stage}{self.kind}{self.micro_batch}"

    @property
    def actions(self) -> tuple[Action, ...]:
        """Itself, so that a cell of either kind is read the same way."""
        return (self,)

    @property
    def result(self) -> ChunkResult:
        """The result that other actions wait for; of a complete backward pass, the input's gradient."""
        match self.kind:
            case ActionKind.FORWARD:
                value = ResultKind.OUTPUT
            case ActionKind.BACKWARD | ActionKind.BACKWARD_INPUT:
                value = ResultKind.INPUT_GRADIENT
            case ActionKind.BACKWARD_WEIGHT:
                value = ResultKind.WEIGHT_GRADIENT
        return ChunkResult(value, self.stage, self.micro_batch)


@dataclass(frozen=True, slots=True)
class OverlappedPair:
    """A forward and a whole backward pass of two chunks, executed together: one computes while the other communicates.

    Both may begin when both have what they need, and both end together.
    """

    forward: Action
    backward: Action

    def __str__(self) -> str:
        """Name it briefly: `3F12&4B2`."""
        return f"{self.forward}&{self.backward}"

    @property
    def actions(self) -> tuple[Action, ...]:
        """The forward pass, then the backward pass."""
        return (self.forward, self.backward)


Cell = Action | OverlappedPair


@dataclass(frozen=True, slots=True)
class StageMessage:
    """A result that one rank sends to another."""

    result: ChunkResult
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class ScheduledCell:
    """A cell in an order in which a schedule can be executed; `after` are the numbers of the steps it waits for."""

    rank: int
    cell: Cell
    after: tuple[int, ...]


class ScheduleError(ValueError):
    """A table that cannot be executed; what is wrong with it, and where."""


@dataclass(frozen=True)
class PipelineSchedule:
    """A pipeline schedule: what each rank does, in its order.

    `placement[direction][stage]` is the rank that holds the stage for micro-batches of that direction;
    `ranks[rank]` are its cells.
    """

    name: str
    micro_batches: int
    placement: tuple[tuple[int, ...], ...]
    ranks: tuple[tuple[Cell, ...], ...]

    @property
    def num_ranks(self) -> int:
        """How many ranks the pipeline has."""
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        """Into how many stages the model is cut."""
        return len(self.placement[0])

    @cached_property
    def stages(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The (stage, direction) that each rank holds, [rank]; one set of weights each."""
        held: list[list[tuple[int, int]]] = [[] for _ in self.ranks]
        for direction, ranks in enumerate(self.placement):
            for stage, rank in enumerate(ranks):
                held[rank].append((stage, direction))
        return tuple(tuple(sorted(stages)) for stages in held)

    def direction_of(self, micro_batch: int) -> int:
        """Return which way a micro-batch travels: the first half of DualPipe's go up the ranks, the second down."""
        return micro_batch * len(self.placement) // self.micro_batches

    def rank_of(self, result: ChunkResult) -> int:
        """Return the rank that makes a result."""
        return self.placement[self.direction_of(result.micro_batch)][result.stage]

    def inputs_of(self, action: Action) -> tuple[ChunkResult, ...]:
        """Return the results that an action needs before it begins, those of its own rank included."""
        stage, micro_batch = action.stage, action.micro_batch
        if action.kind is ActionKind.FORWARD:
            return (ChunkResult(ResultKind.OUTPUT, stage - 1, micro_batch),) if stage > 0 else ()
        if action.kind is ActionKind.BACKWARD_WEIGHT:
            return (ChunkResult(ResultKind.INPUT_GRADIENT, stage, micro_batch),)
        own = ChunkResult(ResultKind.OUTPUT, stage, micro_batch)
        if stage == self.num_stages - 1:
            return (own,)
        return (own, ChunkResult(ResultKind.INPUT_GRADIENT, stage + 1, micro_batch))

    def receives(self, cell: Cell) -> tuple[StageMessage, ...]:
        """Return the messages that a cell waits for."""
        return tuple(
            StageMessage(result, source, target)
            for action in cell.actions
            for target in (self.rank_of(action.result),)
            for result in self.inputs_of(action)
            for source in (self.rank_of(result),)
            if source != target
        )

    def sends(self, cell: Cell) -> tuple[StageMessage, ...]:
        """Return the messages that follow a cell: outputs to the next stage, gradients to the one before."""
        return tuple(self._sends(cell))

    def _sends(self, cell: Cell) -> Iterator[StageMessage]:
        for action in cell.actions:
            result = action.result
            step = {ResultKind.OUTPUT: 1, ResultKind.INPUT_GRADIENT: -1}.get(result.value, 0)
            reader = result.stage + step
            if step and 0 <= reader < self.num_stages:
                source, target = self.rank_of(result), self.placement[self.direction_of(result.micro_batch)][reader]
                if source != target:
                    yield StageMessage(result, source, target)

    @cached_property
    def order(self) -> tuple[ScheduledCell, ...]:
        """All cells so that each comes after what it needs, and after those before it on its rank.

        Raises:
            ScheduleError: no such order exists; the message names what a rank waits for.
        """
        steps: list[ScheduledCell] = []
        producer: dict[ChunkResult, int] = {}  # by number in the order
        position = [0] * self.num_ranks
        waiting: defaultdict[ChunkResult, list[int]] = defaultdict(list)
        ready = list(reversed(range(self.num_ranks)))
        while ready:
            rank = ready.pop()
            for cell in self.ranks[rank][position[rank] :]:
                needs = [need for action in cell.actions for need in self.inputs_of(action)]
                missing = next((need for need in needs if need not in producer), None)
                if missing is not None:
                    waiting[missing].append(rank)
                    break
                for action in cell.actions:
                    producer[action.result] = len(steps)
                    ready += waiting.pop(action.result, ())
                steps.append(ScheduledCell(rank, cell, tuple(producer[need] for need in needs)))
                position[rank] += 1
        for rank, cells in enumerate(self.ranks):
            if position[rank] < len(cells):
                stuck = next(result for result, ranks in waiting.items() if rank in ranks)
                raise ScheduleError(f"deadlock: rank {rank} at {cells[position[rank]]} waits for the {stuck}")
        return tuple(steps)
