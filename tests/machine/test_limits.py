"""Measured limits: the fit of products by depth, and the file that a plan reads."""

from __future__ import annotations

import random
import tomllib

import pytest

from abyssal.machine.limits import MachineLimits, fit_depth, measure_limits
from abyssal.plan.hardware import Chip


def test_fit_finds_peak_and_half_depth_of_a_law() -> None:
    generator = random.Random(0)
    for _ in range(20):
        peak, half = generator.uniform(1e9, 1e13), generator.uniform(1, 800)
        rates = {depth: peak * depth / (depth + half) for depth in (96, 256, 700, 2048)}
        assert fit_depth(rates) == pytest.approx((peak, half), rel=1e-6)


def test_fit_of_rates_that_fall_with_depth_has_no_half_depth() -> None:
    peak, half = fit_depth({128: 9e11, 256: 8e11, 512: 7e11})
    assert half == 0
    assert 0 < peak < 9e12


def test_file_is_the_chip_that_was_measured() -> None:
    limits = MachineLimits("float32", "cpu, 3 threads: float32 5 GFLOP/s", 5e9, 0.75, 33.0, 2e10, None)
    chip = Chip.parse(
        tomllib.loads(limits.toml("mine") + "memory_bytes = 'x'\n")["mine"] | {"memory_bytes": 7e9, "sources": {}}, "x"
    )
    assert (chip.bf16_flops, chip.matmul_peak, chip.matmul_half_depth) == (5e9, 0.75, 33.0)
    assert chip.pass_seconds_per_byte == pytest.approx(5e-11)
    assert chip.description == "measured: cpu, 3 threads: float32 5 GFLOP/s"


def test_measurement_is_a_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    import functools

    from abyssal.machine import limits

    monkeypatch.setattr(limits, "measure_matmul", functools.partial(limits.measure_matmul, seconds=0.05))
    monkeypatch.setattr(limits, "PASSED", 1 << 12)
    monkeypatch.setattr(limits, "ROWS", 32)
    monkeypatch.setattr(limits, "COLUMNS", 48)
    monkeypatch.setattr(limits, "DEPTHS", (16, 64))
    chip = Chip.parse(tomllib.loads(measure_limits().toml("here"))["here"], "x")
    assert chip.bf16_flops > 0
    assert chip.matmul_peak is not None
    assert 0 < chip.matmul_peak <= 1
    assert set(chip.sources) == {
        "bf16_flops", "memory_bytes", "memory_bandwidth", "matmul_peak", "matmul_half_depth", "pass_seconds_per_byte",
    }  # fmt: skip
