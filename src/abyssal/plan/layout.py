"""How a model is laid over devices: degrees of parallelism, schedule, precision, and which layers a stage holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from abyssal.config import ModelConfig, RunConfig
from abyssal.errors import UsageError, nearest, nearest_numbers
from abyssal.plan.hardware import Cluster
from abyssal.plan.schedules import SCHEDULES

Precision = Literal["fp8", "bf16"]
Recompute = Literal["published", "none", "full"]
PRECISIONS: tuple[Precision, ...] = ("fp8", "bf16")
STATE_FORMATS: tuple[StateFormat, ...] = ("published", "trainer")
StateFormat = Literal["published", "trainer"]
RECOMPUTES: tuple[Recompute, ...] = ("published", "none", "full")
#: Schedules that pair a forward with a backward pass, so that one computes while the other communicates.
PAIRED_SCHEDULES = ("dualpipe", "dualpipev")


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; what is left of the devices is data parallel, with ZeRO-1. Paper: §3.1."""

    pp_size: int = 1
    ep_size: int = 1
    tp_size: int = 1  # of attention and dense FFN, with sequence parallelism; experts are whole
    cp_size: int = 1  # a sequence's tokens over so many devices
    schedule: str = "1f1b"
    stages_per_rank: int = 2  # of the interleaved schedule
    micro_batch_size: int = 1
    precision: Precision = "fp8"
    recompute: Recompute = "published"
    state: StateFormat = "published"  # formats kept between steps: the report's, or those of Abyssal's trainer
    overlap: bool | None = None  # all-to-all under computation; none: where the schedule pairs passes

    @property
    def num_stages(self) -> int:
        """Into how many stages the model is cut."""
        return self.pp_size * {"interleaved": self.stages_per_rank, "dualpipev": 2}.get(self.schedule, 1)

    @property
    def overlaps(self) -> bool:
        """Whether computation hides the all-to-all of another micro-batch."""
        return self.schedule in PAIRED_SCHEDULES if self.overlap is None else self.overlap

    @property
    def stages_of_ranks(self) -> list[list[int]]:
        """The stages whose weights each pipeline rank holds."""
        size, stages = self.pp_size, self.num_stages
        if self.schedule == "dualpipe":
            return [sorted({rank, size - 1 - rank}) for rank in range(size)]
        if self.schedule == "dualpipev":
            return [[rank, stages - 1 - rank] for rank in range(size)]
        return [list(range(rank, stages, size)) for rank in range(size)]

    def dp_size(self, cluster: Cluster) -> int:
        """Devices that hold the same attention weights and see different sequences."""
        return cluster.devices // (self.pp_size * self.tp_size * self.cp_size)

    def tokens_of_rank(self, sequence_length: int) -> float:
        """Tokens of a micro-batch that one device holds outside attention."""
        return self.micro_batch_size * sequence_length / (self.tp_size * self.cp_size)

    def __str__(self) -> str:
        """Name it briefly: `dualpipe PP16 EP64, fp8`."""
        interleaved = f" VP{self.stages_per_rank}" if self.schedule == "interleaved" else ""
        degrees = "".join(f" {name}{n}" for name, n in (("TP", self.tp_size), ("CP", self.cp_size)) if n > 1)
        rest = "" if self.recompute == "published" else f", recompute {self.recompute}"
        rest += "" if self.state == "published" else f", state {self.state}"
        rest += f", {self.micro_batch_size} sequences a micro-batch" if self.micro_batch_size > 1 else ""
        if self.overlap is not None and self.overlap != (self.schedule in PAIRED_SCHEDULES):
            rest += ", overlap" if self.overlap else ", no overlap"
        return f"{self.schedule} PP{self.pp_size}{interleaved} EP{self.ep_size}{degrees}, {self.precision}{rest}"


#: The report's own. Paper: §3.1.
PUBLISHED = Layout(pp_size=16, ep_size=64, schedule="dualpipe")


#: The fields of a stage that cost time and activations.
BLOCK_KINDS = ("dense", "moe", "mtp", "heads")


@dataclass(frozen=True)
class StageBlocks:
    """The blocks of a pipeline stage, by kind."""

    embedding: bool
    dense: int
    moe: int
    mtp: int
    heads: int  # uses of the output head: one, and one for each MTP module

    @property
    def layers(self) -> int:
        """Transformer blocks."""
        return self.dense + self.moe + self.mtp


def check_layout(layout: Layout, model: ModelConfig, cluster: Cluster) -> None:
    """Raise UsageError with the first reason why the model cannot be laid over the cluster like this."""
    for name in ("pp_size", "ep_size", "tp_size", "cp_size", "stages_per_rank", "micro_batch_size"):
        if getattr(layout, name) < 1:
            raise UsageError(f"{name}={getattr(layout, name)}: must be at least 1")
    for value, allowed, name in (
        (layout.schedule, tuple(SCHEDULES), "schedule"),
        (layout.precision, PRECISIONS, "precision"),
        (layout.recompute, RECOMPUTES, "recompute"),
        (layout.state, STATE_FORMATS, "state"),
    ):
        if value not in allowed:
            raise UsageError(f"{name}={value}: must be one of {', '.join(allowed)}{nearest(value, allowed)}")
    if layout.precision == "fp8" and cluster.chip.fp8_flops is None:
        raise UsageError(f"precision=fp8: {cluster.name} has no FP8; nearest: bf16")
    ranks = layout.pp_size * layout.tp_size * layout.cp_size
    _must_divide("pp_size * tp_size * cp_size", ranks, "devices", cluster.devices)
    _must_divide("ep_size", layout.ep_size, "n_routed_experts", model.n_routed_experts)
    _must_divide("ep_size", layout.ep_size, "the devices of a stage", cluster.devices // layout.pp_size)
    _must_divide("tp_size", layout.tp_size, "num_attention_heads", model.num_attention_heads)
    _must_divide("tp_size", layout.tp_size, "node_size", cluster.chip.node_size)
    if layout.num_stages > model.num_hidden_layers:
        raise UsageError(
            f"pp_size={layout.pp_size}: {layout.num_stages} stages, but the model has "
            f"num_hidden_layers={model.num_hidden_layers}"
        )


def count_micro_batches(layout: Layout, run: RunConfig, cluster: Cluster, batch_size: int) -> int:
    """Return the micro-batches of a step of `batch_size` sequences, on each data-parallel rank.

    Raises:
        UsageError: the sequences do not divide.
    """
    portion = layout.dp_size(cluster) * layout.micro_batch_size
    if batch_size % portion:
        below = batch_size // portion * portion
        nearest_sizes = ", ".join(str(size) for size in (below, below + portion) if size)
        raise UsageError(
            f"a step of {batch_size} sequences: must be a multiple of data-parallel ranks * micro_batch_size = "
            f"{layout.dp_size(cluster)} * {layout.micro_batch_size} = {portion}; "
            f"nearest: {nearest_sizes}"
        )
    return batch_size // portion


def assign_stages(layout: Layout, model: ModelConfig, block_times: dict[str, float]) -> list[StageBlocks]:
    """Cut a model into stages so that the busiest rank has the least to do; the report does not say how it is cut.

    Layers go one by one to the rank with the least work. Embedding and dense layers are in the first stages; last
    norm, heads and MTP modules in the last.

    Args:
        layout: which ranks hold which stages.
        model: what is cut.
        block_times: relative times of `layer`, `mtp` and `head` (one use).
    """
    modules = model.num_nextn_predict_layers
    last = modules * block_times["mtp"] + (1 + modules) * block_times["head"]
    layers = [0] * layout.num_stages
    holders = layout.stages_of_ranks

    def load(stage: int) -> float:
        return layers[stage] * block_times["layer"] + (last if stage == layout.num_stages - 1 else 0.0)

    for _ in range(model.num_hidden_layers):
        ranks = sorted(range(layout.pp_size), key=lambda rank: (sum(load(s) for s in holders[rank]), rank))
        layers[min(holders[ranks[0]], key=lambda stage: (load(stage), stage))] += 1
    stages, seen = [], 0
    for stage, count in enumerate(layers):
        dense = max(0, min(model.first_k_dense_replace - seen, count))
        seen += count
        at_end = stage == layout.num_stages - 1
        stages.append(
            StageBlocks(stage == 0, dense, count - dense, modules if at_end else 0, 1 + modules if at_end else 0)
        )
    return stages


def divisors(number: int) -> list[int]:
    """Return the divisors of a number in ascending order."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _must_divide(name: str, value: int, other: str, number: int) -> None:
    if value > number or number % value:
        raise UsageError(
            f"{name}={value}: must divide {other}={number}; nearest: {nearest_numbers(value, divisors(number))}"
        )
