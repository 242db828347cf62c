"""Everything that a plan came to, as plain data: what `--json` prints, and what the text and the page are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from abyssal.plan.calibration import Calibration
from abyssal.plan.flops import decode_flops, forward_flops, training_flops
from abyssal.plan.hardware import Chip, Cluster
from abyssal.plan.layout import Layout
from abyssal.plan.memory import cache_bytes_per_token
from abyssal.plan.parameters import count_parameters
from abyssal.plan.rank_memory import memory_fault
from abyssal.plan.schedules import SCHEDULES, Timeline, build_schedule, simulate
from abyssal.plan.search import SearchResult
from abyssal.plan.training_plan import TRAFFIC, StepPlan, TrainingPlan

#: The parts of a rank's step as they are called in print, by the simulation's name.
PARTS = {"F": "1F", "B": "1B", "I": "1B, inputs only", "W": "1W", "F&B": "1F1B overlapped", "idle": "bubble"}


def plan_facts(plan: TrainingPlan, memory_limit: float) -> dict[str, Any]:
    """Return the plan of a training run; times in seconds, sizes in bytes."""
    step = plan.phases[0].step
    run, cluster, layout = step.run, step.cluster, step.layout
    return {
        "name": run.name,
        "description": run.description,
        "cluster": _cluster(cluster),
        "layout": {"text": str(layout), "dp_size": layout.dp_size(cluster), **asdict(layout)},
        "parameters": _parameters(step),
        "flops_per_token": _flops(step),
        "cache_bytes_per_token": cache_bytes_per_token(run.model),
        "memory": _memory(step, memory_limit),
        "traffic": {name: asdict(size) for name, size in zip(TRAFFIC, step.traffic, strict=True)},
        "links": _links(step),
        "step": _step(step),
        "bubble": _bubble(step),
        "phases": [
            {
                "name": phase.step.run.name,
                "layout": str(phase.step.layout),
                "tokens": phase.tokens,
                "steps": phase.steps,
                "step_s": phase.step.seconds,
                "tokens_per_device_s": phase.step.tokens_per_device_s,
                "mfu": phase.step.mfu(),
                "seconds": phase.seconds,
                "device_hours": phase.device_hours,
                "cost": phase.device_hours * plan.price,
            }
            for phase in plan.phases
        ],
        "other_device_hours": plan.other_hours,
        "device_hours": plan.device_hours,
        "price_per_device_hour": plan.price,
        "cost": plan.cost,
        "calibration": [
            {"name": name, "value": value, "fitted_to": fitted_to} for name, value, fitted_to in Calibration.constants()
        ],
    }


def search_facts(found: SearchResult, memory_limit: float) -> dict[str, Any]:
    """Return what a search found: layouts by step time, and why the others fail."""
    return {
        "memory_limit": memory_limit,
        "ranked": [
            {
                "layout": str(step.layout),
                "step_s": step.seconds,
                "tokens_per_device_s": step.tokens_per_device_s,
                "mfu": step.mfu(),
                "memory_bytes": step.memory[step.fullest].total,
                "options": layout_options(step.layout),
            }
            for step in found.ranked
        ],
        "fitting": len(found.fitting),
        "refused": [
            {"count": refused.count, "layout": str(refused.layout), "reason": refused.reason}
            for refused in found.refused
        ],
    }


def layout_options(layout: Layout) -> list[str]:
    """Return the options of `abyssal plan` that choose a layout."""
    chosen = ["--schedule", layout.schedule, "--pp", str(layout.pp_size), "--ep", str(layout.ep_size)]
    if layout.schedule == "interleaved":
        chosen += ["--stages-per-rank", str(layout.stages_per_rank)]
    for name, size in (("--tp", layout.tp_size), ("--cp", layout.cp_size), ("--micro-batch", layout.micro_batch_size)):
        chosen += [name, str(size)] if size > 1 else []
    chosen += ["--precision", layout.precision]
    return chosen + (["--recompute", layout.recompute] if layout.recompute != "published" else [])


def _cluster(cluster: Cluster) -> dict[str, Any]:
    chip = cluster.chip
    figures = {f: getattr(chip, f) for f in Chip.model_fields if f not in ("description", "sources")}
    return {
        "name": cluster.name,
        "description": chip.description,
        "devices": cluster.devices,
        "nodes": cluster.nodes,
        "figures": {
            name: {"value": value, "source": chip.sources.get(name, "not stated")}
            for name, value in figures.items()
            if value is not None
        },
    }


def _parameters(step: StepPlan) -> dict[str, int]:
    count = count_parameters(step.run.model)
    return {"total": count.total, "activated": count.activated, "mtp": count.mtp.total}


def _flops(step: StepPlan) -> dict[str, float]:
    model, length = step.run.model, step.run.train.sequence_length
    return {
        "sequence_length": length,
        "training": training_flops(model, length).total,
        "training_without_mtp": training_flops(model, length, mtp=False).total,
        "training_without_mtp_not_causal": training_flops(model, length, mtp=False, causal=False).total,
        "prefill": forward_flops(model, length).total,
        "decode": decode_flops(model, length).total,
    }


def _memory(step: StepPlan, limit: float) -> dict[str, Any]:
    fault = memory_fault(step.layout, step.memory, limit)
    return {
        "limit": limit,
        "fits": fault is None,
        "fault": str(fault) if fault else None,
        "fullest_rank": step.fullest,
        "ranks": [asdict(memory) | {"total": memory.total} for memory in step.memory],
    }


def _links(step: StepPlan) -> dict[str, float]:
    """Return seconds of one MoE layer's computation and communication for one micro-batch, both passes."""
    block = step.pipeline.blocks["moe"]
    return {
        "layer_forward_s": block.alone.forward,
        "layer_backward_s": block.alone.backward,
        "layer_pair_s": block.paired.forward + block.paired.backward,
        "layer_communication_s": 2 * block.communication,
    }


def _step(step: StepPlan) -> dict[str, Any]:
    ranks: Sequence[int] = sorted({0, step.layout.pp_size // 2 - 1 if step.layout.pp_size > 1 else 0})
    return {
        "seconds": step.seconds,
        "tokens": step.tokens,
        "micro_batches": step.micro_batches,
        "tokens_per_device_s": step.tokens_per_device_s,
        "tokens_per_s": step.tokens_per_device_s * step.cluster.devices,
        "mfu": step.mfu(),
        "mfu_not_causal": step.mfu(causal=False),
        "parts": {
            f"rank {rank}": {PARTS[part]: seconds for part, seconds in step.timeline.parts(rank).items()}
            | {"optimizer": step.optimizer_s}
            for rank in ranks
        },
        "exposed_and_imbalance_s": step.exposed_and_imbalance_s,
        "stages": [{f.name: getattr(stage, f.name) for f in fields(stage)} for stage in step.pipeline.stages],
    }


def _bubble(step: StepPlan) -> dict[str, Any]:
    """Return the closed form of the schedule's bubble at the mean costs of a stage, and what the simulation counts."""
    schedule, costs = SCHEDULES[step.layout.schedule], step.pipeline.simulated()
    middle = len(step.pipeline.stages) // 2
    forward, half, weight = (
        cost[middle] if isinstance(cost, Sequence) else cost
        for cost in (costs.forward, costs.backward_input, costs.backward_weight)
    )
    pair = costs.overlapped(middle, middle) if costs.overlapped else forward + half + weight
    return {
        "formula": schedule.bubble_formula,
        "closed_form_s": schedule.bubble(step.layout.pp_size, forward, half + weight, weight, pair),
        "simulated_s": step.timeline.bubble,
        "idle_s": [step.timeline.idle(rank) for rank in range(step.layout.pp_size)],
    }


def drawable_timeline(step: StepPlan) -> Timeline:
    """Return the timeline of the same pipeline with few enough micro-batches to be drawn."""
    size = step.layout.pp_size
    fewest = -(-(2 * size + 8) // size) * size
    if step.micro_batches <= fewest:
        return step.timeline
    stages = step.layout.stages_per_rank if step.layout.schedule == "interleaved" else None
    return simulate(build_schedule(step.layout.schedule, size, fewest, stages), step.pipeline.simulated())
