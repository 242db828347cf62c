"""What a plan needs to know of this machine, measured: products by depth, passes over memory, its size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from abyssal.machine.describe import memory_bytes
from abyssal.machine.matmul_speed import choose_compute_dtype, measure_matmul

#: Rows and columns of the timed products, and their depths: the shapes of layers, shallow ones among them.
ROWS, COLUMNS, DEPTHS = 1024, 1024, (128, 256, 512, 1024, 2048)
#: Values of the timed pass: far more than a cache holds.
PASSED = 1 << 26
REPEATS = 5


@dataclass(frozen=True)
class MachineLimits:
    """Measured limits of one device; FLOP/s are those of the dtype that training would choose."""

    dtype: str
    device: str
    peak_flops: float
    matmul_peak: float  # of a deep product, over the peak
    matmul_half_depth: float  # the depth at which a product reaches half of that
    memory_bandwidth: float  # bytes/s, read and written, of torch's elementwise kernels
    memory_bytes: int | None

    def toml(self, name: str) -> str:
        """Return it as the chip `name` in a file for `abyssal plan --hardware`."""
        figures = {
            "bf16_flops": (self.peak_flops, f"best square {self.dtype} product"),
            "memory_bytes": (float(self.memory_bytes or 0), "what this process may use"),
            "memory_bandwidth": (self.memory_bandwidth, "an elementwise product of large tensors, read and written"),
            "matmul_peak": (self.matmul_peak, "products of growing depth, extrapolated"),
            "matmul_half_depth": (self.matmul_half_depth, "the same products"),
            "pass_seconds_per_byte": (1 / self.memory_bandwidth, "as memory_bandwidth"),
        }
        known = {key: value for key, value in figures.items() if value[0]}
        lines = [f"[{name}]", f'description = "measured: {self.device}"']
        lines += [f"{key} = {value:.6g}" for key, (value, _) in known.items()]
        lines += [f"[{name}.sources]", *(f'{key} = "abyssal machine: {source}"' for key, (_, source) in known.items())]
        return "\n".join(lines) + "\n"


def measure_limits(device: str = "cpu") -> MachineLimits:
    """Measure this machine in a few seconds, on as many threads as torch is set to."""
    speed = measure_matmul(device=device)
    dtype = choose_compute_dtype(speed).dtype
    peak = speed.gflops[dtype] * 1e9
    rates = {depth: _product_rate(depth, dtype, device) for depth in DEPTHS}
    best, half_depth = fit_depth(rates)
    return MachineLimits(
        dtype=str(dtype).removeprefix("torch."),
        device=speed.sentence().removeprefix("matmul on "),
        peak_flops=peak,
        matmul_peak=min(1.0, best / peak),
        matmul_half_depth=max(1.0, half_depth),
        memory_bandwidth=_pass_bandwidth(dtype, device),
        memory_bytes=memory_bytes() if device == "cpu" else torch.cuda.get_device_properties(device).total_memory,
    )


def fit_depth(rates: dict[int, float]) -> tuple[float, float]:
    """Fit rate(K) = peak * K / (K + half) to rates by depth K: 1 / rate is linear in 1 / K. Returns (peak, half)."""
    xs, ys = [1 / depth for depth in rates], [1 / rate for rate in rates.values()]
    slope, offset = statistics.linear_regression(xs, ys)
    offset = max(offset, min(ys) / 10)
    return 1 / offset, max(0.0, slope / offset)


def _product_rate(depth: int, dtype: torch.dtype, device: str) -> float:
    """Return the FLOP/s of one product [ROWS, depth] @ [depth, COLUMNS]."""
    generator = torch.Generator().manual_seed(depth)
    left, right = (torch.randn(rows, depth, generator=generator).to(device, dtype) for rows in (ROWS, COLUMNS))
    seconds = _best_time(lambda: torch.nn.functional.linear(left, right), device)
    return 2 * ROWS * COLUMNS * depth / seconds


def _pass_bandwidth(dtype: torch.dtype, device: str) -> float:
    """Return the bytes/s of an elementwise product into memory that exists."""
    left, right, out = (torch.ones(PASSED, dtype=dtype, device=device) for _ in range(3))
    seconds = _best_time(lambda: torch.mul(left, right, out=out), device)
    return 3 * PASSED * left.element_size() / seconds


def _best_time(run: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(REPEATS + 1):  # the first prepares the kernel
        begin = time.perf_counter()
        run()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return max(min(times[1:]), 1e-9)
