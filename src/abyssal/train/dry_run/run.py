"""The dry run: refuse what a real run would refuse, build each distinct part once, and add up every stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from abyssal.config import RunConfig
from abyssal.parallel.layout import RankLayout
from abyssal.train.build import lay_out_run
from abyssal.train.dry_run.cost import BatchShare, Memory, StepCommunication, communication_of, memory_of
from abyssal.train.dry_run.parts import EMBEDDING, MTP, ModelPart, build_parts
from abyssal.train.dry_run.stages import CutStage, cut

NODE_SIZE = 8  # ranks, where the recipe says nothing: the launcher is not there to ask


@dataclass(frozen=True)
class StageCost:
    """One stage, and its first rank, which holds at least as much as any other of the stage."""

    cut: CutStage
    elements: int  # of the whole stage
    local_elements: int
    memory: Memory
    communication: StepCommunication


@dataclass(frozen=True)
class DryRun:
    """What a run would be."""

    config: RunConfig
    layout: RankLayout
    share: BatchShare
    parts: Mapping[str, ModelPart]
    stages: tuple[StageCost, ...]

    @property
    def elements(self) -> dict[str, int]:
        """The whole tensors' elements, over all stages: of the main model, of MTP modules, of second embeddings."""
        every = sum(stage.elements for stage in self.stages)
        mtp = sum(stage.cut.parts.get(MTP, 0) for stage in self.stages) * elements_of(self.parts.get(MTP))
        second = sum(stage.cut.copied for stage in self.stages) * elements_of(self.parts[EMBEDDING])
        return {"main": every - mtp - second, "mtp": mtp, "second_embedding": second}

    @property
    def communication(self) -> StepCommunication:
        """Of all ranks in a step, if all sent as much as the first of their stage."""
        return sum((stage.communication for stage in self.stages), StepCommunication()) * self.layout.dp_size


def elements_of(part: ModelPart | None) -> int:
    """Return the elements of the whole tensors of a part, gate biases included, as the published totals count."""
    return part.sum("elements") + part.buffer_elements if part else 0


def dry_run(config: RunConfig, world_size: int) -> DryRun:
    """Lay a run over `world_size` ranks and say what each would hold and send, without data, files or other processes.

    Where the recipe leaves the compute dtype to the machine, it is bfloat16 here.

    Raises:
        UsageError: it does not fit; names what would.
    """
    if config.train.compute_dtype == "auto":
        train = config.train.model_copy(update={"compute_dtype": "bfloat16"})
        config = config.model_copy(update={"train": train})
    layout = lay_out_run(config, world_size, NODE_SIZE, planned=True)
    sequences = config.batch_size_at(config.train.tokens) // layout.dp_size
    size = config.train.micro_batch_size
    share = BatchShare(sequences, -(-sequences // size), config.train.sequence_length)
    cuts = cut(config, layout, share.micro_batches)
    parts = build_parts(config, layout)
    stages = []
    for number, stage in enumerate(cuts):
        counted = [(parts[name], count) for name, count in stage.parts.items()]
        stages.append(
            StageCost(
                cut=stage,
                elements=sum(elements_of(part) * count for part, count in counted),
                local_elements=sum(
                    (part.sum("local_elements") + part.buffer_elements) * count for part, count in counted
                ),
                memory=memory_of(stage, parts, config.parallel, share),
                communication=communication_of(stage, parts, config, layout, share, number=number),
            )
        )
    return DryRun(config, layout, share, parts, tuple(stages))
