"""Pipeline schedules as data: built, checked, simulated, drawn. The trainer executes the same tables."""

from abyssal.plan.schedules.catalogue import SCHEDULES, NamedSchedule, build_schedule
from abyssal.plan.schedules.check import check_schedule
from abyssal.plan.schedules.drawing import ActionBox, boxes, text_rows, trace
from abyssal.plan.schedules.schedule import (
    Action,
    ActionKind,
    Cell,
    ChunkResult,
    OverlappedPair,
    PipelineSchedule,
    ResultKind,
    ScheduledCell,
    ScheduleError,
    StageMessage,
)
from abyssal.plan.schedules.simulate import PassCosts, TimedCell, Timeline, peak_activations, simulate

__all__ = [
    "SCHEDULES",
    "Action",
    "ActionBox",
    "ActionKind",
    "Cell",
    "ChunkResult",
    "NamedSchedule",
    "OverlappedPair",
    "PassCosts",
    "PipelineSchedule",
    "ResultKind",
    "ScheduleError",
    "ScheduledCell",
    "StageMessage",
    "TimedCell",
    "Timeline",
    "boxes",
    "build_schedule",
    "check_schedule",
    "peak_activations",
    "simulate",
    "text_rows",
    "trace",
]
