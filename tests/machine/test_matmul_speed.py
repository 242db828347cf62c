"""The measurement keeps to its time, and the choice follows from its figures."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from abyssal.machine import matmul_speed
from abyssal.machine.matmul_speed import MatmulSpeed, choose_compute_dtype, measure_matmul


def speed(fp32: float, bf16: float) -> MatmulSpeed:
    return MatmulSpeed("cpu", 2, {torch.float32: fp32, torch.bfloat16: bf16})


@pytest.fixture
def machine(monkeypatch) -> Callable[[float], tuple[Callable[[], float], list[int]]]:
    """Pretend a machine of so many GFLOP/s: a clock that goes on as matmuls would take, and the sizes they had."""

    def build(gflops: float) -> tuple[Callable[[], float], list[int]]:
        now, sizes = [0.0], []

        def run(operands: int, device: str) -> None:
            sizes.append(operands)
            now[0] += 2 * operands**3 / gflops / 1e9

        monkeypatch.setattr(matmul_speed, "_operands", lambda size, dtype, device: size)
        monkeypatch.setattr(matmul_speed, "_run", run)
        return lambda: now[0], sizes

    return build


@pytest.mark.parametrize("gflops", [0.5, 20.0, 700.0, 50_000.0])
def test_the_figure_is_the_machines_and_the_time_is_kept(machine, gflops):
    clock, sizes = machine(gflops)
    found = measure_matmul((torch.float32, torch.bfloat16), 1.2, clock=clock)
    assert list(found.gflops.values()) == pytest.approx([gflops, gflops])
    assert clock() < 1.5
    assert max(sizes) <= 2048


def test_a_fast_machine_is_measured_at_the_largest_size_and_a_slow_one_at_a_small(machine):
    clock, sizes = machine(700.0)
    measure_matmul(clock=clock)
    assert max(sizes) == 2048
    clock, sizes = machine(1.0)
    measure_matmul(clock=clock)
    assert max(sizes) == 256


def test_this_machine_is_measured():
    found = measure_matmul((torch.float32,), 0.001)
    assert found.gflops[torch.float32] > 0
    assert found.threads == torch.get_num_threads()


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"),
    [(100, 130, torch.bfloat16), (100, 129, torch.float32), (100, 20, torch.float32), (120, 790, torch.bfloat16)],
)
def test_bf16_must_be_so_much_faster(fp32, bf16, expected):
    choice = choose_compute_dtype(speed(fp32, bf16))
    assert choice.dtype == expected
    assert f"bfloat16 is {bf16 / fp32:.2f} times float32" in choice.reason


def test_the_reason_says_what_was_measured():
    assert choose_compute_dtype(speed(120.4, 1790)).reason == (
        "compute in bfloat16: matmul on cpu, 2 threads: float32 120, bfloat16 1,790 GFLOP/s; "
        "bfloat16 is 14.87 times float32, at least the 1.3 that it must be"
    )


@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float64"])
def test_what_is_asked_for_is_taken(asked):
    choice = choose_compute_dtype(speed(100, 1000), asked)
    assert choice.dtype == getattr(torch, asked)
    assert "asked for" in choice.reason


def test_importing_measures_nothing():
    script = (
        "import torch, time\n"
        "torch.nn.functional.linear = torch.mm = None\n"
        "before = torch.get_num_threads()\n"
        "import abyssal.machine.matmul_speed, abyssal.machine.describe\n"
        "assert torch.get_num_threads() == before and not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
