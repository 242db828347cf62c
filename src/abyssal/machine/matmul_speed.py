"""How fast this machine multiplies matrices: a short measurement, and the compute dtype that follows from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
#: bf16 must win by this much before it is worth its rounding.
MIN_BF16_GAIN = 1.3
SMALLEST = 256
#: Beyond these sizes a matmul does not get faster.
LARGEST = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class MatmulSpeed:
    """The best matmul seen on one device, by dtype."""

    device: str
    threads: int
    gflops: Mapping[torch.dtype, float]

    def sentence(self) -> str:
        """Return the measurement in words: `matmul on cpu, 2 threads: float32 120, bfloat16 790 GFLOP/s`."""
        figures = ", ".join(f"{_name(dtype)} {value:,.0f}" for dtype, value in self.gflops.items())
        threads = f", {self.threads} thread{'s' * (self.threads != 1)}" if self.device == "cpu" else ""
        return f"matmul on {self.device}{threads}: {figures} GFLOP/s"


@dataclass(frozen=True)
class ComputeDtype:
    """A choice and the sentence that says why."""

    dtype: torch.dtype
    reason: str


def measure_matmul(
    dtypes: Sequence[torch.dtype] = (FLOAT32, BFLOAT16),
    seconds: float = 1.2,
    *,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> MatmulSpeed:
    """Measure the peak of square matmuls `[n, n] @ [n, n].T` in each dtype, on as many threads as torch is set to.

    Args:
        dtypes: what to measure.
        seconds: about how long it may take in all; a slow machine is measured at smaller sizes, each at least once.
        device: `cpu`, or `cuda` with an optional index.
        clock: what tells the time, in seconds.
    """
    share = seconds / len(dtypes)
    return MatmulSpeed(
        device=device,
        threads=torch.get_num_threads(),
        gflops={dtype: _peak(dtype, device, share, clock) for dtype in dtypes},
    )


def choose_compute_dtype(speed: MatmulSpeed, asked: str = "auto") -> ComputeDtype:
    """Return the dtype to compute in: the one asked for, or bf16 where its matmul is at least 1.3 times fp32's.

    Args:
        speed: a measurement; `auto` needs fp32 and bf16 in it.
        asked: `auto`, or a dtype's name.
    """
    if asked != "auto":
        return ComputeDtype(getattr(torch, asked), f"compute in {asked}: asked for by train.compute_dtype")
    gain = speed.gflops[BFLOAT16] / speed.gflops[FLOAT32]
    dtype = BFLOAT16 if gain >= MIN_BF16_GAIN else FLOAT32
    comparison = "at least" if dtype is BFLOAT16 else "less than"
    return ComputeDtype(
        dtype,
        f"compute in {_name(dtype)}: {speed.sentence()}; bfloat16 is {gain:.2f} times float32, "
        f"{comparison} the {MIN_BF16_GAIN} that it must be",
    )


def _peak(dtype: torch.dtype, device: str, seconds: float, clock: Callable[[], float]) -> float:
    """Return the best GFLOP/s within `seconds`: the size doubles as long as a few of the next one fit."""
    end = clock() + seconds
    size, best = SMALLEST, 0.0
    largest = LARGEST[torch.device(device).type]
    operands = _operands(size, dtype, device)
    _run(operands, device)  # the first call of a size prepares its kernels
    while True:
        start = clock()
        _run(operands, device)
        now = clock()
        took = max(now - start, 1e-9)
        best = max(best, 2 * size**3 / took / 1e9)
        if size < largest and now + 3 * 8 * took < end:  # its preparation and two measurements
            size *= 2
            operands = _operands(size, dtype, device)
            _run(operands, device)
        elif now + took >= end:
            return best


def _operands(size: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    return left, right


def _run(operands: tuple[torch.Tensor, torch.Tensor], device: str) -> None:
    """Multiply as `torch.nn.Linear` does, and wait until it is done."""
    torch.nn.functional.linear(*operands)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
