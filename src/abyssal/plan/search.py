"""Search for the best layout: all that divide are estimated in closed form, the fastest that fit are simulated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from abyssal.config import RunConfig
from abyssal.errors import UsageError
from abyssal.plan.calibration import Calibration
from abyssal.plan.hardware import Cluster
from abyssal.plan.layout import Layout, count_micro_batches, divisors
from abyssal.plan.operations import DeviceWork
from abyssal.plan.rank_memory import MemoryFault, estimate_memory, memory_fault
from abyssal.plan.schedules import SCHEDULES
from abyssal.plan.stage_costs import BlockCost, PipelineCosts, block_costs, pipeline_costs
from abyssal.plan.training_plan import StepPlan, optimizer_cost, plan_step

#: So many of the fastest estimates are simulated.
SIMULATED = 12
MAX_STAGES, MAX_TP_SIZE = 64, 8


@dataclass(frozen=True)
class RefusedLayouts:
    """Layouts that fail for one kind of reason: how many, and the sentence of one of them."""

    count: int
    layout: Layout
    reason: str


@dataclass(frozen=True)
class SearchResult:
    """The layouts that a search ranked, found to fit, and refused."""

    ranked: tuple[StepPlan, ...]  # the fastest first
    fitting: tuple[Layout, ...]  # all that fit, those ranked among them, by estimated time
    refused: tuple[RefusedLayouts, ...]


def candidates(run: RunConfig, cluster: Cluster, base: Layout) -> Iterator[Layout]:
    """Yield `base` with every pipeline, expert and tensor degree that divides devices, experts and heads."""
    model = run.model
    for pp_size in divisors(cluster.devices):
        stage = cluster.devices // pp_size
        for ep_size in divisors(model.n_routed_experts):
            for tp_size in divisors(cluster.chip.node_size):
                fits = stage % ep_size == 0 and stage % (tp_size * base.cp_size) == 0
                if not fits or tp_size > MAX_TP_SIZE or model.num_attention_heads % tp_size:
                    continue
                for schedule in SCHEDULES if pp_size > 1 else ("1f1b",):
                    for per_rank in (2, 4) if schedule == "interleaved" else (2,):
                        layout = replace(
                            base,
                            pp_size=pp_size,
                            ep_size=ep_size,
                            tp_size=tp_size,
                            schedule=schedule,
                            stages_per_rank=per_rank,
                        )
                        if layout.num_stages <= min(MAX_STAGES, model.num_hidden_layers):
                            yield layout


def search(
    run: RunConfig, cluster: Cluster, base: Layout, calibration: Calibration, memory_limit: float
) -> SearchResult:
    """Rank layouts by the time of a full step, among those whose every device stays within `memory_limit` bytes.

    A layout that does not fit is tried again with the whole forward pass recomputed. Precision, context parallelism
    and micro-batches are those of `base`.
    """
    batch_size = run.batch_size_at(run.train.tokens)
    refused: dict[str, RefusedLayouts] = {}
    closest: MemoryFault | None = None
    estimates: list[tuple[float, Layout]] = []
    blocks: dict[tuple[object, ...], dict[str, BlockCost]] = {}

    def refuse(kind: str, layout: Layout, reason: str) -> None:
        first = refused.get(kind, RefusedLayouts(0, layout, reason))
        refused[kind] = replace(first, count=first.count + 1)

    for candidate in candidates(run, cluster, base):
        fault: MemoryFault | None = None
        for recompute in dict.fromkeys((base.recompute, "full")):
            layout = replace(candidate, recompute=recompute)
            try:
                num_micro_batches = count_micro_batches(layout, run, cluster, batch_size)
                check_micro_batches(layout, num_micro_batches)
            except UsageError as error:
                refuse(f"{layout.schedule}: micro-batches", layout, str(error))
                fault = None
                break
            work = DeviceWork(run.model, layout, run.train.sequence_length, run.optimizer.name)
            key = (layout.ep_size, layout.tp_size, layout.recompute)
            if key not in blocks:
                blocks[key] = block_costs(work, cluster.chip, calibration)
            pipeline = pipeline_costs(work, blocks[key], calibration)
            fault = memory_fault(layout, estimate_memory(work, cluster, pipeline.stages), memory_limit)
            if fault is None:
                seconds = (
                    estimate(layout, pipeline, num_micro_batches)
                    + optimizer_cost(work, cluster, pipeline, calibration)[0]
                )
                estimates.append((seconds, layout))
                break
        if fault is not None:
            refuse("memory", fault.layout, str(fault))
            if closest is None or fault.excess < closest.excess:
                closest = fault
    if closest is not None:  # of those too large, show the one that lacks least
        refused["memory"] = RefusedLayouts(refused["memory"].count, closest.layout, str(closest))
    estimates.sort(key=lambda pair: pair[0])
    plans = []
    for _, layout in estimates[:SIMULATED]:
        try:
            plans.append(plan_step(run, cluster, layout, calibration))
        except UsageError as error:  # a table of more actions than a schedule may have
            refuse("size", layout, str(error))
    fitting = [plan for plan in plans if memory_fault(plan.layout, plan.memory, memory_limit) is None]
    ranked = tuple(sorted(fitting, key=lambda plan: plan.seconds))
    return SearchResult(ranked, tuple(layout for _, layout in estimates), tuple(refused.values()))


def estimate(layout: Layout, pipeline: PipelineCosts, num_micro_batches: int) -> float:
    """Return a step's time without its optimizer: the busiest rank's passes, and the bubble's closed form."""
    costs = pipeline.simulated()
    forward, half, weight = (list(c) for c in (costs.forward, costs.backward_input, costs.backward_weight))  # type: ignore[arg-type]
    pairs = [pipeline.pair(n, n) if pipeline.overlapped else forward[n] + half[n] + weight[n] for n in range(len(half))]
    share = 0.5 if layout.schedule == "dualpipe" else 1.0
    busiest = max(sum(pairs[n] for n in stages) for stages in layout.stages_of_ranks) * share * num_micro_batches
    mean = [sum(values) / len(values) for values in (forward, half, weight, pairs)]
    bubble = SCHEDULES[layout.schedule].bubble(layout.pp_size, mean[0], mean[1] + mean[2], mean[2], mean[3])
    return busiest + max(0.0, bubble)


def check_micro_batches(layout: Layout, number: int) -> None:
    """Raise UsageError where the schedule takes no such number of micro-batches, without building its table."""
    size = layout.pp_size
    if layout.schedule == "dualpipe" and (size % 2 or number % 2 or number < 2 * size):
        raise UsageError(f"{number} micro-batches on {size} ranks: DualPipe takes even numbers, at least {2 * size}")
    if layout.schedule == "dualpipev" and number < 2 * size:
        raise UsageError(f"{number} micro-batches on {size} ranks: DualPipeV takes at least {2 * size}")
    if layout.schedule == "interleaved" and number % size:
        raise UsageError(f"{number} micro-batches on {size} ranks: interleaved 1F1B takes a multiple of {size}")


def nearest_fitting(
    run: RunConfig, cluster: Cluster, wanted: Layout, calibration: Calibration, memory_limit: float
) -> Layout | None:
    """Return the layout most like `wanted` among those that fit; the fastest of equally near ones."""
    result = search(run, cluster, wanted, calibration, memory_limit)
    degrees = ("pp_size", "ep_size", "tp_size")

    def distance(layout: Layout) -> float:
        apart = sum(abs(math.log2(getattr(layout, name) / getattr(wanted, name))) for name in degrees)
        return apart + (layout.schedule != wanted.schedule) + (layout.recompute != wanted.recompute)

    return min(result.fitting, key=distance, default=None)
