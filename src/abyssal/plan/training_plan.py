"""The plan of a training run: memory, the time of a step and its parts, hours and money."""

from __future__ import annotations

from dataclasses import dataclass, replace

from abyssal.config import RunConfig
from abyssal.errors import UsageError
from abyssal.plan.calibration import Calibration
from abyssal.plan.communication import LinkBytes, reduction_bytes, stage_boundary_bytes
from abyssal.plan.flops import muon_flops, training_flops
from abyssal.plan.hardware import Cluster
from abyssal.plan.layout import Layout, check_layout, count_micro_batches
from abyssal.plan.operations import DeviceWork
from abyssal.plan.rank_memory import RankMemory, rank_memory, rank_parameters, replicas
from abyssal.plan.schedules import Timeline, build_schedule, simulate
from abyssal.plan.stage_costs import PipelineCosts, block_costs, pipeline_costs
from abyssal.plan.steps import steps_by_batch_size

HOUR = 3600.0
#: What a device sends bytes for, in the order of `StepPlan.traffic`.
TRAFFIC = ("layers", "stages", "gradients and weights")
#: Bytes an optimizer step moves for a parameter of its shard: gradient read, master and moments read and written.
UPDATE_BYTES = 4 + 2 * (4 + 4) + 2


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step of so many sequences on one layout."""

    run: RunConfig
    cluster: Cluster
    layout: Layout
    batch_size: int
    micro_batches: int  # on each data-parallel rank
    pipeline: PipelineCosts
    timeline: Timeline
    optimizer_s: float
    memory: tuple[RankMemory, ...]  # of a device of each pipeline rank
    traffic: tuple[LinkBytes, ...]  # bytes a device sends in a step, by what for; see `TRAFFIC`

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.timeline.makespan + self.optimizer_s

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return self.batch_size * self.run.train.sequence_length

    @property
    def tokens_per_device_s(self) -> float:
        """Tokens a second and device."""
        return self.tokens / self.seconds / self.cluster.devices

    def mfu(self, *, causal: bool = True) -> float:
        """Return model FLOPs over the bf16 peak, without those of MTP, as the published figures count."""
        return mfu(self.run, self.cluster, self.tokens_per_device_s, causal=causal)

    @property
    def exposed_and_imbalance_s(self) -> float:
        """What the fitted residual adds to the passes of a rank in the middle."""
        stretch = self.pipeline.stretch
        return self.timeline.busy(self.layout.pp_size // 2) * (1.0 - 1.0 / stretch)

    @property
    def fullest(self) -> int:
        """The pipeline rank with the most memory."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)


def mfu(run: RunConfig, cluster: Cluster, tokens_per_device_s: float, *, causal: bool = True) -> float:
    """Return the share of the bf16 peak that a speed amounts to, in FLOPs of the main model."""
    flops = training_flops(run.model, run.train.sequence_length, causal=causal, mtp=False).total
    return tokens_per_device_s * flops / cluster.chip.bf16_flops


def plan_step(
    run: RunConfig, cluster: Cluster, layout: Layout, calibration: Calibration, batch_size: int | None = None
) -> StepPlan:
    """Plan one step; without `batch_size`, one of the end of the run.

    Raises:
        UsageError: the layout does not divide, or its schedule takes no such number of micro-batches.
    """
    check_layout(layout, run.model, cluster)
    batch_size = run.batch_size_at(run.train.tokens) if batch_size is None else batch_size
    num_micro_batches = count_micro_batches(layout, run, cluster, batch_size)
    stages = layout.stages_per_rank if layout.schedule == "interleaved" else None
    schedule = build_schedule(layout.schedule, layout.pp_size, num_micro_batches, stages)
    length = run.train.sequence_length
    work = DeviceWork(run.model, layout, length, run.optimizer.name)
    pipeline = pipeline_costs(work, block_costs(work, cluster.chip, calibration), calibration)
    sent = stage_boundary_bytes(run.model, layout, cluster.chip, work.tokens)
    travel = sent.seconds(cluster.chip)
    timeline = simulate(schedule, pipeline.simulated(), lambda source, target: travel)
    optimizer_s, reduced = optimizer_cost(work, cluster, pipeline, calibration)
    blocks = [pipeline.costs[n].traffic for n in layout.stages_of_ranks[layout.pp_size // 2]]
    copies = 0.5 if layout.schedule == "dualpipe" and layout.pp_size > 1 else 1.0
    inside = sum(blocks, LinkBytes()) * (2 * num_micro_batches * copies)
    return StepPlan(
        run=run,
        cluster=cluster,
        layout=layout,
        batch_size=batch_size,
        micro_batches=num_micro_batches,
        pipeline=pipeline,
        timeline=timeline,
        optimizer_s=optimizer_s,
        memory=rank_memory(work, cluster, pipeline.stages, schedule),
        traffic=(inside, sent * (2.0 * num_micro_batches * layout.num_stages / layout.pp_size), reduced),
    )


@dataclass(frozen=True)
class Phase:
    """A run from its first to its last token."""

    step: StepPlan  # of its full batch
    tokens: int
    steps: int
    seconds: float

    @property
    def device_hours(self) -> float:
        """Hours times devices."""
        return self.seconds / HOUR * self.step.cluster.devices


@dataclass(frozen=True)
class TrainingPlan:
    """Phases one after another on the same cluster, and what they cost."""

    phases: tuple[Phase, ...]
    price: float  # money a device hour
    other_hours: float = 0.0  # device hours that are given, not planned: post-training

    @property
    def device_hours(self) -> float:
        """All phases, and what was given."""
        return sum(phase.device_hours for phase in self.phases) + self.other_hours

    @property
    def cost(self) -> float:
        """Money for all of it."""
        return self.device_hours * self.price


def plan_phase(run: RunConfig, cluster: Cluster, layout: Layout, calibration: Calibration) -> Phase:
    """Plan a whole run: its steps at every batch size it has.

    A step's time is linear in its micro-batches once the pipeline is full, so two sizes are simulated. The line also
    serves where a ramp begins with fewer than the schedule takes.
    """
    step = plan_step(run, cluster, layout, calibration)
    counted = list(steps_by_batch_size(run))
    slope, offset = _line(step, calibration) if len(counted) > 1 else (step.seconds / step.micro_batches, 0.0)
    portion = layout.dp_size(cluster) * layout.micro_batch_size
    seconds = sum(count * (slope * size / portion + offset) for size, count in counted)
    return Phase(step, run.train.tokens, sum(count for _, count in counted), seconds)


def plan_training(
    runs: list[RunConfig], cluster: Cluster, layout: Layout, calibration: Calibration, price: float
) -> TrainingPlan:
    """Plan runs one after another.

    A later phase with longer sequences takes as many more context-parallel devices, so that a device keeps the tokens
    of a micro-batch; the report does not say how its context extension was laid out.
    """
    first = runs[0].train.sequence_length
    for run in runs:
        if run.train.sequence_length % first:
            raise UsageError(
                f"{run.name}: train.sequence_length={run.train.sequence_length}: must be a multiple of the first "
                f"phase's {first}"
            )
    layouts = [replace(layout, cp_size=layout.cp_size * (run.train.sequence_length // first)) for run in runs]
    phases = (
        plan_phase(run, cluster, unquantized, calibration) for run, unquantized in zip(runs, layouts, strict=True)
    )
    return TrainingPlan(tuple(phases), price)


def _line(step: StepPlan, calibration: Calibration) -> tuple[float, float]:
    """Return seconds a micro-batch, and seconds beside them, through two simulated sizes."""
    portion = step.batch_size // step.micro_batches
    more = plan_step(step.run, step.cluster, step.layout, calibration, 2 * step.micro_batches * portion)
    slope = (more.seconds - step.seconds) / step.micro_batches
    return slope, step.seconds - slope * step.micro_batches


def optimizer_cost(
    work: DeviceWork, cluster: Cluster, pipeline: PipelineCosts, calibration: Calibration
) -> tuple[float, LinkBytes]:
    """Return the seconds of reducing gradients and updating weights, on the rank that has most, and its bytes."""
    layout, chip = work.layout, cluster.chip
    dense_ranks, expert_ranks = replicas(layout, cluster)
    slowest, most = 0.0, LinkBytes()
    for stages in layout.stages_of_ranks:
        held = rank_parameters(work.model, layout, [pipeline.stages[n] for n in stages])
        sent = reduction_bytes(held.dense + held.unquantized, dense_ranks, 1, chip, layout.precision)
        sent += reduction_bytes(held.experts, expert_ranks, layout.ep_size, chip, layout.precision)
        shard = (held.dense + held.unquantized) / dense_ranks + held.experts / expert_ranks
        update = shard * UPDATE_BYTES / (chip.memory_bandwidth * calibration.memory_bandwidth)
        if work.optimizer == "muon":
            orthogonal = muon_flops(work.model) / (layout.pp_size * dense_ranks)
            update += orthogonal / (chip.bf16_flops * (chip.matmul_peak or calibration.bf16_matmul_peak))
        seconds = sent.seconds(chip) + update
        if seconds > slowest:
            slowest, most = seconds, sent
    return slowest, most
