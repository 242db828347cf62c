"""Which parts a pipeline stage holds, and how many micro-batches are under way in it: as the plan cuts and orders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from abyssal.config import RunConfig
from abyssal.parallel.layout import RankLayout
from abyssal.plan.calibration import Calibration
from abyssal.plan.hardware import Cluster, packaged_chips
from abyssal.plan.layout import Layout, StageBlocks, check_layout
from abyssal.plan.operations import VALUE_BYTES, DeviceWork
from abyssal.plan.rank_memory import stage_activation_bytes
from abyssal.plan.schedules import build_schedule, peak_activations
from abyssal.plan.stage_costs import block_costs, pipeline_costs
from abyssal.train.dry_run.parts import DENSE, EMBEDDING, HEAD, MOE, MTP

#: The order of micro-batches, and the chip on which layers are weighed against MTP and head where the model is cut.
SCHEDULE, CHIP = "1f1b", "h800"


@dataclass(frozen=True)
class CutStage:
    """One pipeline stage."""

    parts: Mapping[str, int]  # how many of each it holds
    copied: bool  # whether its embedding is a second one, beside the first stage's
    shared: bool  # whether another stage has the embedding too, so that their gradients are summed
    in_flight: int  # micro-batches that have gone forward and not yet back, at most
    activations: float  # bytes that these keep


def cut(config: RunConfig, layout: RankLayout, micro_batches: int) -> list[CutStage]:
    """Cut the model into the layout's stages, as the plan does for 1F1B.

    Raises:
        UsageError: more stages than layers.
    """
    planned = Layout(
        pp_size=layout.pp_size,
        ep_size=layout.ep_size,
        schedule=SCHEDULE,
        micro_batch_size=config.train.micro_batch_size,
        precision="bf16",
        recompute="none",
        state="trainer",
    )
    chip = packaged_chips()[CHIP].model_copy(update={"node_size": layout.node_size})
    check_layout(planned, config.model, Cluster(CHIP, chip, layout.world_size))
    work = DeviceWork(config.model, planned, config.train.sequence_length, config.optimizer.name)
    calibration = Calibration()
    stages = pipeline_costs(work, block_costs(work, chip, calibration), calibration).stages
    schedule = build_schedule(SCHEDULE, layout.pp_size, micro_batches)
    width = getattr(torch, config.train.compute_dtype).itemsize / VALUE_BYTES
    parts_of_stages = [parts_of(stage, tied=config.model.tie_word_embeddings) for stage in stages]
    twice = any(copied for _, copied in parts_of_stages)
    cuts = []
    for number, (stage, (parts, copied)) in enumerate(zip(stages, parts_of_stages, strict=True)):
        in_flight = round(peak_activations(schedule, number))
        kept = in_flight * width * stage_activation_bytes(work, stage)
        cuts.append(CutStage(parts, copied, twice and EMBEDDING in parts, in_flight, kept))
    return cuts


def parts_of(stage: StageBlocks, *, tied: bool) -> tuple[dict[str, int], bool]:
    """Return the parts of a stage, and whether it needs a second embedding: for MTP modules, or as the head."""
    copied = not stage.embedding and bool(stage.mtp or (stage.heads and tied))
    counted = {
        EMBEDDING: int(stage.embedding or copied),
        DENSE: stage.dense,
        MOE: stage.moe,
        HEAD: int(bool(stage.heads)),
        MTP: stage.mtp,
    }
    return {part: count for part, count in counted.items() if count}, copied
