"""How long a device takes for an operation, and a link for bytes; the fitted constants enter here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from abyssal.plan.calibration import Calibration
from abyssal.plan.hardware import Chip
from abyssal.plan.operations import AttentionKernel, Matmul, MemoryPass, Operation, Phase

#: Rows and columns of the result that one multiprocessor works on at a time.
TILE = 128


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds of each phase of a forward and a backward pass."""

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0

    @property
    def backward(self) -> float:
        """The whole backward pass."""
        return self.input_gradient + self.weight_gradient

    def __add__(self, other: PhaseTimes) -> PhaseTimes:
        """Add phase by phase."""
        return PhaseTimes(
            self.forward + other.forward,
            self.input_gradient + other.input_gradient,
            self.weight_gradient + other.weight_gradient,
        )

    def __mul__(self, times: float) -> PhaseTimes:
        """Scale every phase."""
        return PhaseTimes(self.forward * times, self.input_gradient * times, self.weight_gradient * times)


@dataclass(frozen=True)
class CalibratedChip:
    """A chip with the calibration's efficiencies; `busy_sms` of its multiprocessors do something else."""

    chip: Chip
    calibration: Calibration
    busy_sms: float = 0.0

    @property
    def free_fraction(self) -> float:
        """The fraction of the multiprocessors that compute."""
        return 1.0 - self.busy_sms / self.chip.sms if self.chip.sms else 1.0

    def seconds(self, operation: Operation) -> float:
        """Return the time of one operation alone."""
        match operation:
            case Matmul():
                return max(self._product(operation), operation.bytes / self._bandwidth)
            case AttentionKernel():
                forward = operation.phase == "forward"
                fitted = self.calibration.attention_forward if forward else self.calibration.attention_backward
                return operation.flops / (self.chip.bf16_flops * self.free_fraction * fitted)
            case MemoryPass():
                return self.memory_pass_seconds(operation.bytes)

    def memory_pass_seconds(self, size: float) -> float:
        """Return the time of passing over so many bytes of memory, read or written."""
        per_byte = self.chip.pass_seconds_per_byte or 1.0 / self._bandwidth
        return size * per_byte * (1.0 if self.chip.sms else self.calibration.cpu_passes)

    def phase_times(self, operations: Iterable[Operation]) -> PhaseTimes:
        """Return the times of a list of operations by phase, with what the listed kernels leave over."""
        seconds: dict[Phase, float] = {"forward": 0.0, "input_gradient": 0.0, "weight_gradient": 0.0}
        for operation in operations:
            seconds[operation.phase] += self.seconds(operation)
        return PhaseTimes(**seconds) * (1.0 + self.calibration.other_kernels if self.chip.sms else 1.0)

    @property
    def _bandwidth(self) -> float:
        return self.chip.memory_bandwidth * self.calibration.memory_bandwidth

    def _product(self, product: Matmul) -> float:
        """Return the time of matrix products: full waves of tiles, and a depth that hides each tile's beginning."""
        fp8 = product.precision == "fp8" and self.chip.fp8_flops is not None
        fitted = self.calibration.fp8_matmul_peak if fp8 else self.calibration.bf16_matmul_peak
        peak = self.chip.matmul_peak or fitted
        half_depth = self.chip.matmul_half_depth or self.calibration.matmul_half_depth * (1.0 if fp8 else 0.5)
        if product.phase == "weight_gradient":
            peak *= self.calibration.weight_gradient
        rate = (
            self.chip.flops(product.precision)
            * self.free_fraction
            * peak
            * product.depth
            / (product.depth + half_depth)
        )
        return product.flops / rate * self._waves(product)

    def _waves(self, product: Matmul) -> float:
        """Return the time of whole waves of tiles over that of the tiles themselves, at least 1."""
        if self.chip.sms is None:
            return 1.0
        tiles = math.ceil(product.rows / TILE) * math.ceil(product.columns / TILE) * product.count
        sms = self.chip.sms * self.free_fraction
        # fewer tiles than multiprocessors: kernels then take smaller tiles, and split the depth
        return math.ceil(tiles / sms) * sms / tiles if tiles > sms else 1.0
