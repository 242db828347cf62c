"""What happens before the first step: decide by measurement what the recipe leaves open, and build the model."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from abyssal.checkpoint.hf import ModelReader, load_into, read_model_directory
from abyssal.config import ModelConfig, RunConfig
from abyssal.errors import ConfigError, UsageError
from abyssal.machine.allocator import keep_freed_memory
from abyssal.machine.describe import available_cores
from abyssal.machine.matmul_speed import choose_compute_dtype, measure_matmul
from abyssal.model import Transformer, initialise
from abyssal.ops.kernels import choose_kernels
from abyssal.parallel.apply import parallelise
from abyssal.parallel.layout import RankLayout, lay_out
from abyssal.parallel.mesh import Mesh
from abyssal.ranks.placements import local_shard
from abyssal.ranks.ranks import ALONE, Ranks
from abyssal.train.optimizer import build_optimizer
from abyssal.train.step import train_step

WARM_UP_STEPS = 3  # the first steps allocate memory, and the matrix library builds code for the sizes it meets
TIMED_STEPS = 3


def build_model(config: RunConfig, device: torch.device, mesh: Mesh | None = None) -> Transformer:
    """Build the model of a run, with fp32 (or fp64) master weights on `device`. With a mesh, a rank holds its part."""
    model = shape_model(config, device, mesh)
    model.to_empty(device=device)
    initial_weights(model, config)
    return model


def shape_model(config: RunConfig, device: torch.device, mesh: Mesh | None = None) -> Transformer:
    """Return the model that is to run on `device`, on the meta device still: shapes and types without memory.

    Everything that changes how the model runs is applied here, in this order.
    """
    dtype: torch.dtype = getattr(torch, config.train.compute_dtype)
    with torch.device("meta"):
        model = Transformer(config.model, choose_kernels(device, dtype), compute_dtype=dtype)
    model.to(torch.promote_types(dtype, torch.float32))
    if mesh is not None:
        parallelise(model, config.parallel, mesh)
    return model


def initial_weights(model: Transformer, config: RunConfig) -> None:
    """Fill a model in place with the weights that the run begins with."""
    initialise(model, config.seed, local_shard)
    reader = open_initial_weights(config)
    if reader is not None:  # MTP modules that the directory lacks keep their initial weights
        load_into(model, reader, allow_missing_mtp=True)


def open_initial_weights(config: RunConfig) -> ModelReader | None:
    """Open the model directory that the run continues from, if it names one.

    Raises:
        ConfigError, ModelDirectoryError: no such directory, or the recipe's model has another shape.
    """
    if config.init_from is None:
        return None
    found, reader = read_model_directory(Path(config.init_from))
    free = {"max_position_embeddings", "rope_scaling", "initializer_range", "num_nextn_predict_layers"}
    written = (ModelConfig.from_hf(model.to_hf()) for model in (config.model, found))  # one spelling for both
    ours, theirs = (model.model_dump(exclude=free) for model in written)
    different = [f"{name}={ours[name]!r} (there {theirs[name]!r})" for name in ours if ours[name] != theirs[name]]
    if different:
        raise ConfigError(
            f"init_from={config.init_from!r}: the recipe's model has another shape: {', '.join(different)}"
        )
    return reader


def fit(config: RunConfig, ranks: Ranks) -> RankLayout:
    """Lay the run over its ranks.

    Raises:
        UsageError: it does not fit; names what would.
    """
    layout = lay_out_run(config, ranks.world_size, ranks.local_world_size)
    if layout.pp_size > 1:
        raise UsageError(
            f"parallel.pp_size={layout.pp_size}: pipelines are planned (`abyssal plan`) and dry-run "
            "(`abyssal train --dry-run`), not executed yet; allowed here: 1"
        )
    return layout


def lay_out_run(config: RunConfig, world_size: int, node_size: int) -> RankLayout:
    """Lay a run over `world_size` ranks, `node_size` on each node unless the recipe says, executed or not.

    Raises:
        UsageError: it does not fit; names what would.
    """
    layout = lay_out(config.parallel, config.model, world_size, node_size)
    if world_size > 1 and config.train.time_budget_s is not None:
        raise UsageError(
            f"train.time_budget_s={config.train.time_budget_s:g}: measures one process, but this run has "
            f"{world_size} ranks; give train.tokens, and remove the budget (unset)"
        )
    sizes, multiple = config.schedule.batch_size, config.train.batch_multiple
    constant = all(segment.to in (None, sizes.start) for segment in sizes.segments)
    divided = config.batch_size_at(0) if constant else multiple
    if divided % layout.dp_size:
        name = "schedule.batch_size: a step's sequences, " if constant else "train.batch_multiple="
        above = -(-divided // layout.dp_size) * layout.dp_size
        fewer = max(n for n in range(1, layout.dp_size) if divided % n == 0)
        raise UsageError(
            f"{name}{divided}: must be a multiple of the {layout.dp_size} ranks that share them; nearest: {above}, or "
            f"{fewer} ranks"
        )
    return layout


def settle(threads: int) -> None:
    """Set what holds for the whole process: threads, and an allocator that keeps the step's memory."""
    torch.set_num_threads(threads)
    keep_freed_memory()


def decide(config: RunConfig, device: torch.device, ranks: Ranks = ALONE) -> tuple[RunConfig, list[str]]:
    """Fill in what the recipe leaves to the machine: compute dtype, threads, and tokens where a time is given.

    Returns:
        The resolved config, which gives the same run wherever it is used again, and a sentence for each decision.
    """
    threads = config.train.threads or max(1, available_cores() // ranks.local_world_size)
    settle(threads)
    updates: dict[str, object] = {"threads": threads}
    sentences = [f"threads: {threads}"]
    if config.train.compute_dtype == "auto":
        choice = choose_compute_dtype(measure_matmul(device=device.type))
        updates["compute_dtype"] = str(choice.dtype).removeprefix("torch.")
        sentences.append(choice.reason)
    config = _with_train(config, updates)
    if config.train.time_budget_s is not None:
        seconds = seconds_per_step(config, device)
        batch_tokens = config.batch_size_at(0) * config.train.sequence_length
        steps = max(1, int(config.train.time_budget_s / seconds))
        config = _with_train(config, {"tokens": steps * batch_tokens, "time_budget_s": None})
        sentences.append(
            f"tokens: {steps * batch_tokens:,} in {steps:,} steps, since a step of {batch_tokens:,} tokens "
            f"takes {seconds:.2f} s"
        )
    return config, sentences


def _with_train(config: RunConfig, updates: dict[str, object]) -> RunConfig:
    values = config.model_dump()
    values["train"].update(updates)
    return RunConfig.parse(values, source=config.name)


def seconds_per_step(config: RunConfig, device: torch.device) -> float:
    """Time a training step of the first batch's size on random tokens, with a model of its own."""
    model = build_model(config.model_copy(update={"init_from": None}), device)
    optimizer = build_optimizer(model, config.optimizer)
    shape = (config.batch_size_at(0), config.train.sequence_length + 1)
    windows = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    times = []
    for _ in range(WARM_UP_STEPS + TIMED_STEPS):
        begin = time.perf_counter()
        train_step(model, optimizer, windows, config, tokens_seen=0)
        times.append(time.perf_counter() - begin)
    return min(times[WARM_UP_STEPS:])  # what disturbs a step only makes it longer


def peak_flops(config: RunConfig, device: torch.device) -> float:
    """Return the measured matmul peak of the compute dtype, FLOP/s, which MFU is stated against."""
    dtype: torch.dtype = getattr(torch, config.train.compute_dtype)
    measured = torch.float32 if dtype == torch.float64 else dtype
    return measure_matmul([measured], device=device.type).gflops[measured] * 1e9
