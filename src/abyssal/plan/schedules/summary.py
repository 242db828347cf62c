"""What a schedule comes to at given times, beside the closed forms: the report's Table 2, counted."""

from __future__ import annotations

from dataclasses import dataclass

from abyssal.errors import UsageError
from abyssal.plan.schedules.catalogue import SCHEDULES, build_schedule
from abyssal.plan.schedules.schedule import PipelineSchedule
from abyssal.plan.schedules.simulate import PassCosts, Timeline, peak_activations, simulate


@dataclass(frozen=True)
class PassTimes:
    """The times of passes over 1/P of the model, which is what a rank of P computes for one micro-batch.

    A stage of a schedule with more stages takes less in proportion. `overlapped` is the time of a forward and a whole
    backward pass together; it is their sum without it. `transfer` is the time of a message between ranks.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    overlapped: float | None = None
    transfer: float = 0.0

    @property
    def backward(self) -> float:
        """The whole backward pass."""
        return self.backward_input + self.backward_weight

    @property
    def pair(self) -> float:
        """A forward and a backward pass together."""
        return self.forward + self.backward if self.overlapped is None else self.overlapped


@dataclass(frozen=True)
class ScheduleSummary:
    """The figures of one schedule. Memory is in parts of 1/P of the model: its weights, its micro-batch's activations.

    `bubble` is the idle time of the rank that waits longest; `closed_bubble` and `closed_activations` are what the
    closed forms give for it.
    """

    name: str
    stages: int
    makespan: float
    bubble: float
    closed_bubble: float
    weights: float
    activations: float
    closed_activations: float


def run_schedule(schedule: PipelineSchedule, times: PassTimes) -> Timeline:
    """Simulate a schedule with the times of `PassTimes`."""
    share = schedule.num_ranks / schedule.num_stages
    costs = PassCosts(
        times.forward * share,
        times.backward_input * share,
        times.backward_weight * share,
        lambda forward_stage, backward_stage: times.pair * share,
    )
    return simulate(schedule, costs, lambda source, target: times.transfer)


def summarise(timeline: Timeline, times: PassTimes) -> ScheduleSummary:
    """Count a timeline that `run_schedule` made with these times."""
    schedule = timeline.schedule
    ranks, stages = schedule.num_ranks, schedule.num_stages
    share, named = ranks / stages, SCHEDULES[schedule.name]
    return ScheduleSummary(
        name=schedule.name,
        stages=stages,
        makespan=timeline.makespan,
        bubble=timeline.bubble,
        closed_bubble=share * named.bubble(ranks, times.forward, times.backward, times.backward_weight, times.pair),
        weights=share * max(len(held) for held in schedule.stages),
        activations=share * max(peak_activations(schedule, rank) for rank in range(ranks)),
        closed_activations=share * named.activations(ranks, stages),
    )


def compare_schedules(ranks: int, micro_batches: int, times: PassTimes) -> tuple[list[ScheduleSummary], dict[str, str]]:
    """Summarise every schedule at these numbers; of those that do not take them, return why by name."""
    summaries, refused = [], {}
    for name in SCHEDULES:
        try:
            schedule = build_schedule(name, ranks, micro_batches)
        except UsageError as error:
            refused[name] = str(error)
        else:
            summaries.append(summarise(run_schedule(schedule, times), times))
    return summaries, refused
