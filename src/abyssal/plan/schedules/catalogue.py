"""The schedules by name, and the closed forms of the report's Table 2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from abyssal.errors import UsageError, nearest
from abyssal.plan.schedules.dualpipe import dualpipe, dualpipe_v
from abyssal.plan.schedules.one_forward_one_backward import interleaved, one_forward_one_backward
from abyssal.plan.schedules.schedule import PipelineSchedule
from abyssal.plan.schedules.zero_bubble import zb1p

#: The bubble of P ranks and the times F, B (the whole backward pass), W (the weights' share of it) and F&B.
Bubble = Callable[[int, float, float, float, float], float]


@dataclass(frozen=True)
class NamedSchedule:
    """A schedule as users ask for it, with what Table 2 says of its bubble and its memory.

    `bubble_formula` and `activations_formula` are texts in P, the ranks, and S, the stages; all three rows of Table 2
    have S = P = PP. `bubble(ranks, F, B, W, F&B)` is in the unit of one stage's times, `activations(ranks, stages)` in
    chunks, on the rank that holds most. Both hold for at least as many micro-batches as stages.
    """

    title: str
    build: Callable[[int, int], PipelineSchedule]
    bubble_formula: str
    bubble: Bubble
    activations_formula: str
    activations: Callable[[int, int], int]


#: Paper: §3.2.1, Table 2. DualPipeV's row is that of DualPipe at S = 2P stages, as its authors state it; that of
#: interleaved 1F1B is Megatron-LM's (2104.04473) in times of its smaller chunks.
SCHEDULES: dict[str, NamedSchedule] = {
    "1f1b": NamedSchedule(
        title="1F1B",
        build=one_forward_one_backward,
        bubble_formula="(P-1)(F+B)",
        bubble=lambda p, f, b, w, fb: (p - 1) * (f + b),
        activations_formula="P",
        activations=lambda p, s: p,
    ),
    "interleaved": NamedSchedule(
        title="interleaved 1F1B",
        build=interleaved,
        bubble_formula="(P-1)(F+B)",
        bubble=lambda p, f, b, w, fb: (p - 1) * (f + b),
        activations_formula="S+P-1",
        activations=lambda p, s: s + p - 1,
    ),
    "zb1p": NamedSchedule(
        title="ZB1P",
        build=zb1p,
        bubble_formula="(P-1)(F+B-2W)",
        bubble=lambda p, f, b, w, fb: (p - 1) * (f + b - 2 * w),
        activations_formula="P",
        activations=lambda p, s: p,
    ),
    "dualpipe": NamedSchedule(
        title="DualPipe",
        build=dualpipe,
        bubble_formula="(P/2-1)(F&B+B-3W)",
        bubble=lambda p, f, b, w, fb: (p / 2 - 1) * (fb + b - 3 * w),
        activations_formula="P+1",
        activations=lambda p, s: p + 1,
    ),
    "dualpipev": NamedSchedule(
        title="DualPipeV",
        build=dualpipe_v,
        bubble_formula="(P-1)(F&B+B-3W)",
        bubble=lambda p, f, b, w, fb: (p - 1) * (fb + b - 3 * w),
        activations_formula="2P+1",
        activations=lambda p, s: s + 1,
    ),
}


@lru_cache(maxsize=64)  # a search over layouts asks for the same ones again, and their order is kept with them
def build_schedule(name: str, ranks: int, micro_batches: int, stages_per_rank: int | None = None) -> PipelineSchedule:
    """Return the schedule of that name; `stages_per_rank` is for `interleaved` alone, where it is 2 unless given.

    Raises:
        UsageError: there is no such schedule, or it does not take these numbers; the nearest that it takes are named.
    """
    if name not in SCHEDULES:
        raise UsageError(f"schedule {name}: must be one of {', '.join(SCHEDULES)}{nearest(name, SCHEDULES)}")
    if stages_per_rank is None:
        return SCHEDULES[name].build(ranks, micro_batches)
    if name != "interleaved":
        raise UsageError(f"stages_per_rank={stages_per_rank}: only the schedule interleaved takes it, not {name}")
    return interleaved(ranks, micro_batches, stages_per_rank)
