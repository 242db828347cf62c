"""What is fitted, apart from what is predicted: each constant with what it was fitted to.

Nothing else in the plan is adjusted to a measurement. docs/plan.md shows every table again with each constant deleted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any


def _constant(value: float, deleted: float, fitted_to: str) -> Any:
    """Declare a constant: its value, what it is when deleted (the ideal), and what it was fitted to."""
    return field(default=value, metadata={"deleted": deleted, "fitted_to": fitted_to})


@dataclass(frozen=True)
class Calibration:
    """The fitted constants; a deleted one takes its ideal value."""

    fp8_matmul_peak: float = _constant(
        0.735, 1.0, "the eight large shapes in DeepGEMM's first H800 table, with the next one: 1.7% root mean square"
    )
    matmul_half_depth: float = _constant(
        720.0, 0.0, "the same table: the depth K at which an FP8 product reaches half of its peak; in bf16 half of it"
    )
    bf16_matmul_peak: float = _constant(
        0.85, 1.0, "794.5 TFLOPS, the best bf16 product that ml-engineering's table has for an H100 SXM"
    )
    weight_gradient: float = _constant(
        0.76, 1.0, "878 to 1,092 TFLOPS of DeepGEMM's FP8 weight gradients at 4,096 to 8,192 tokens"
    )
    attention_forward: float = _constant(
        0.66, 1.0, "1.24 ms a layer in the profile of DeepSeek's training, 112 of 132 multiprocessors"
    )
    attention_backward: float = _constant(0.56, 1.0, "3.8 ms a layer in the same profile")
    memory_bandwidth: float = _constant(0.90, 1.0, "3,000 of 3,350 GB/s, FlashMLA's memory-bound headline on an H800")
    all_to_all: float = _constant(
        0.56, 1.0, "4.3 + 6.2 + 3.4 + 6.2 ms of dispatch and combine, a layer of an overlapped pair in that profile"
    )
    point_to_point: float = _constant(
        0.78, 1.0, "39 of 50 GB/s, DeepEP's low-latency dispatch of 128 tokens over 128 and 256 devices"
    )
    communication_sms: float = _constant(
        20.0, 0.0, "the report, section 3.2.2: multiprocessors that communicate while others compute"
    )
    other_kernels: float = _constant(
        0.283, 0.0, "129 ms, an overlapped pair of four layers in that profile: what the listed kernels leave over"
    )
    cpu_passes: float = _constant(
        4.9,
        1.0,
        "a training step of Abyssal at shape S on two threads of an AMD EPYC (bench/plan.py): how many passes over "
        "memory unfused kernels make for one of the plan's, on chips without multiprocessors",
    )
    exposed_and_imbalance: float = _constant(
        0.0034, 0.0, "19.926 s, the published step: communication left exposed, uneven experts, waiting for the slowest"
    )

    def without(self, name: str) -> Calibration:
        """Return the calibration with one constant deleted."""
        values = {f.name: f.metadata["deleted"] for f in fields(self) if f.name == name}
        return replace(self, **values)

    @classmethod
    def constants(cls) -> list[tuple[str, float, str]]:
        """Return name, value and what it was fitted to, of each constant."""
        return [(f.name, float(f.default), f.metadata["fitted_to"]) for f in fields(cls)]  # type: ignore[arg-type]
