"""What a recipe leaves to the machine, measured and filled in before the first step."""

from __future__ import annotations

import time

import torch

from abyssal.config import RunConfig
from abyssal.machine.allocator import keep_freed_memory
from abyssal.machine.describe import available_cores
from abyssal.machine.matmul_speed import choose_compute_dtype, measure_matmul
from abyssal.ranks.ranks import ALONE, Ranks
from abyssal.train.build import build_run
from abyssal.train.step import train_step

WARM_UP_STEPS = 3  # the first steps allocate memory, and the matrix library builds code for the sizes it meets
TIMED_STEPS = 3


def resolve(config: RunConfig, device: torch.device, ranks: Ranks = ALONE) -> tuple[RunConfig, list[str]]:
    """Fill in threads, compute dtype, and tokens where a time is given, as far as the recipe leaves them open.

    Returns:
        The resolved config, which gives the same run wherever it is used again, and a sentence for each choice.
    """
    sentences = []
    if not config.train.threads:
        config = _with_train(config, threads=cores_of_a_rank(ranks))
        sentences.append(f"threads: {config.train.threads}")
    set_threads(config.train.threads)
    if config.train.compute_dtype == "auto":
        choice = choose_compute_dtype(measure_matmul(device=device.type))
        config = _with_train(config, compute_dtype=str(choice.dtype).removeprefix("torch."))
        sentences.append(choice.reason)
    if config.train.time_budget_s is not None:
        seconds = seconds_per_step(config, device)
        batch_tokens = config.batch_size_at(0) * config.train.sequence_length
        steps = max(1, int(config.train.time_budget_s / seconds))
        config = _with_train(config, tokens=steps * batch_tokens, time_budget_s=None)
        sentences.append(
            f"tokens: {steps * batch_tokens:,} in {steps:,} steps, since a step of {batch_tokens:,} tokens "
            f"takes {seconds:.2f} s"
        )
    return config, sentences


def _with_train(config: RunConfig, **fields: object) -> RunConfig:
    values = config.model_dump()
    values["train"].update(fields)
    return RunConfig.parse(values, source=config.name)


def cores_of_a_rank(ranks: Ranks) -> int:
    """Return how many of this machine's cores each of its ranks has to itself."""
    return max(1, available_cores() // ranks.local_world_size)


def set_threads(threads: int) -> None:
    """Set what holds for the whole process: threads, and an allocator that keeps the step's memory."""
    torch.set_num_threads(threads)
    keep_freed_memory()


def seconds_per_step(config: RunConfig, device: torch.device) -> float:
    """Time a training step of the first batch's size on random tokens, with a model of its own."""
    run = build_run(config.model_copy(update={"init_from": None}), device)
    shape = (config.batch_size_at(0), config.train.sequence_length + 1)
    windows = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    times = []
    for _ in range(WARM_UP_STEPS + TIMED_STEPS):
        begin = time.perf_counter()
        train_step(run.model, run.optimizer, windows, config, tokens_seen=0)
        times.append(time.perf_counter() - begin)
    return min(times[WARM_UP_STEPS:])  # what disturbs a step only makes it longer


def peak_flops(config: RunConfig, device: torch.device) -> float:
    """Return the measured matmul peak of the compute dtype, FLOP/s, which MFU is stated against."""
    dtype: torch.dtype = getattr(torch, config.train.compute_dtype)
    measured = torch.float32 if dtype == torch.float64 else dtype
    return measure_matmul([measured], device=device.type).gflops[measured] * 1e9
