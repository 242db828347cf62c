"""Pipeline schedules as data: built, checked, simulated, drawn. The trainer executes the same tables."""

from abyssal.plan.schedules.catalogue import SCHEDULES, NamedSchedule, build_schedule
from abyssal.plan.schedules.check import check_schedule
from abyssal.plan.schedules.drawing import Box, boxes, text_rows, trace
from abyssal.plan.schedules.simulate import Costs, Span, Timeline, peak_activations, simulate
from abyssal.plan.schedules.table import Action, Cell, Kind, Message, Pair, Result, Schedule, ScheduleError, Step, Value

__all__ = [
    "SCHEDULES",
    "Action",
    "Box",
    "Cell",
    "Costs",
    "Kind",
    "Message",
    "NamedSchedule",
    "Pair",
    "Result",
    "Schedule",
    "ScheduleError",
    "Span",
    "Step",
    "Timeline",
    "Value",
    "boxes",
    "build_schedule",
    "check_schedule",
    "peak_activations",
    "simulate",
    "text_rows",
    "trace",
]
