"""The cost of a stage for one micro-batch: seconds of computation by phase, seconds of communication, bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from abyssal.plan.calibration import Calibration
from abyssal.plan.communication import LinkBytes, layer_communication
from abyssal.plan.hardware import Chip
from abyssal.plan.layout import BLOCK_KINDS, PAIRED_SCHEDULES, Layout, StageBlocks, assign_stages
from abyssal.plan.operations import (
    DeviceWork,
    Operation,
    attention_operations,
    dense_operations,
    head_operations,
    moe_operations,
    mtp_operations,
)
from abyssal.plan.schedules import PassCosts
from abyssal.plan.timing import CalibratedChip, PhaseTimes


@dataclass(frozen=True)
class BlockCost:
    """One block for one micro-batch: alone, while other multiprocessors communicate, and what it communicates."""

    alone: PhaseTimes
    paired: PhaseTimes
    communication: float = 0.0  # seconds in the forward pass, and as many in the backward pass
    traffic: LinkBytes = field(default_factory=LinkBytes)  # bytes, likewise

    def __add__(self, other: BlockCost) -> BlockCost:
        """Add field by field."""
        return BlockCost(
            self.alone + other.alone,
            self.paired + other.paired,
            self.communication + other.communication,
            self.traffic + other.traffic,
        )

    def __mul__(self, times: int) -> BlockCost:
        """Repeat: `layer * num_layers`."""
        return BlockCost(
            self.alone * times, self.paired * times, self.communication * times, self.traffic * float(times)
        )


@dataclass(frozen=True)
class PipelineCosts:
    """The stages of a pipeline and what each costs for one micro-batch."""

    stages: tuple[StageBlocks, ...]
    costs: tuple[BlockCost, ...]
    blocks: dict[str, BlockCost]  # one layer, MTP module or use of the head, by `BLOCK_KINDS`
    paired: bool  # whether the schedule pairs passes
    overlapped: bool  # whether computation hides communication
    stretch: float  # 1 + exposed and imbalance

    def simulated(self) -> PassCosts:
        """Return what the simulation asks for: seconds of each pass of each stage, and of pairs.

        Where computation hides communication without pairs in the table, every pass is charged as in a steady state,
        half of what a forward and a backward pass leave exposed.
        """
        steady = self.overlapped and not self.paired
        passes = [c.paired if steady else c.alone for c in self.costs]
        exposed = [
            max(0.0, c.communication - (c.paired.forward + c.paired.backward) / 2) if steady else c.communication
            for c in self.costs
        ]
        return PassCosts(
            forward=[self.stretch * (p.forward + e) for p, e in zip(passes, exposed, strict=True)],
            backward_input=[self.stretch * (p.input_gradient + e) for p, e in zip(passes, exposed, strict=True)],
            backward_weight=[self.stretch * p.weight_gradient for p in passes],
            overlapped=self.pair if self.paired and self.overlapped else None,
        )

    def pair(self, forward: int, backward: int) -> float:
        """Return the time of a pair of stages: what is longer, both computations or both communications."""
        ahead, back = self.costs[forward], self.costs[backward]
        computing = ahead.paired.forward + back.paired.backward
        return self.stretch * max(computing, ahead.communication + back.communication)


def block_operations(work: DeviceWork, kind: str) -> Iterable[Operation]:
    """Return what one block of a kind computes; a use of the head is a block too."""
    match kind:
        case "dense":
            return chain(attention_operations(work), dense_operations(work))
        case "moe":
            return chain(attention_operations(work), moe_operations(work))
        case "mtp":
            return chain(mtp_operations(work), attention_operations(work), moe_operations(work))
        case _:
            return head_operations(work)


def block_costs(work: DeviceWork, chip: Chip, calibration: Calibration) -> dict[str, BlockCost]:
    """Return the cost of one block of each kind."""
    layout = work.layout
    busy_sms = calibration.communication_sms if chip.sms else 0.0
    chips = (CalibratedChip(chip, calibration), CalibratedChip(chip, calibration, busy_sms))
    costs = {}
    for kind in BLOCK_KINDS:
        operations = list(block_operations(work, kind))
        alone, paired = (_recomputed(calibrated.phase_times(operations), layout) for calibrated in chips)
        if kind == "heads":
            costs[kind] = BlockCost(alone, paired)
            continue
        sent = layer_communication(work.model, layout, chip, work.tokens, moe=kind != "dense")
        again = 1.5 if layout.recompute == "full" else 1.0  # the forward pass communicates twice
        waiting = PhaseTimes(sent.exposed_s(chip), sent.exposed_s(chip)) * again
        hidden_s = sent.hidden_s(chip, calibration) * again
        costs[kind] = BlockCost(alone + waiting, paired + waiting, hidden_s, sent.total * again)
    return costs


def pipeline_costs(work: DeviceWork, blocks: dict[str, BlockCost], calibration: Calibration) -> PipelineCosts:
    """Cut the model into stages and return what each costs for one micro-batch, given `block_costs`."""
    layout = work.layout
    hidden = layout.overlaps
    times = {}
    for name, kind in (("layer", "moe"), ("mtp", "mtp"), ("head", "heads")):
        block = blocks[kind]
        times[name] = block.paired.forward + block.paired.backward + (0.0 if hidden else 2 * block.communication)
    stages = tuple(assign_stages(layout, work.model, times))
    costs = tuple(sum(_blocks_of(stage, blocks), BlockCost(PhaseTimes(), PhaseTimes())) for stage in stages)
    stretch = 1.0 + calibration.exposed_and_imbalance
    return PipelineCosts(stages, costs, blocks, layout.schedule in PAIRED_SCHEDULES, hidden, stretch)


def _blocks_of(stage: StageBlocks, blocks: dict[str, BlockCost]) -> Iterator[BlockCost]:
    for kind in BLOCK_KINDS:
        yield blocks[kind] * getattr(stage, kind)


def _recomputed(passes: PhaseTimes, layout: Layout) -> PhaseTimes:
    """Return the passes with the whole forward pass done again in the backward pass, where the layout says so."""
    return passes + PhaseTimes(input_gradient=passes.forward) if layout.recompute == "full" else passes
