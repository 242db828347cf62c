"""`abyssal doctor`: this machine, and what a model would run on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from abyssal.machine import matmul_speed
from abyssal.machine.describe import describe_machine
from abyssal.ops.kernels import choose_kernels, passed_over
from abyssal.ops.version import PURPOSES


def test_machine_choice_and_versions_are_shown(abyssal: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*, device: str) -> matmul_speed.MatmulSpeed:
        return matmul_speed.MatmulSpeed(device, 3, {torch.float32: 100.0, torch.bfloat16: 250.0})

    monkeypatch.setattr(matmul_speed, "measure_matmul", measured)
    result = abyssal("doctor")
    assert (result.code, result.err) == (0, "")
    lines = [line.rstrip() for line in result.out.splitlines() if line.strip()]
    rows = {line.split(maxsplit=1)[0]: line for line in lines}
    assert describe_machine().torch in rows["torch"]
    assert "float32 100, bfloat16 250 GFLOP/s; bfloat16 is 2.50 times float32" in rows["compute"]
    cpu = torch.device("cpu")
    for purpose in PURPOSES:
        reasons = passed_over(cpu, torch.bfloat16, purpose)
        for operation, version in choose_kernels(cpu, torch.bfloat16, purpose).describe().items():
            start = next(
                n for n, line in enumerate(lines) if line.startswith(f"{purpose}: {operation.replace('_', ' ')} ")
            )
            assert lines[start].endswith(f" {version}")
            said = " ".join(" ".join(lines[start + 1 :]).split())
            assert all(f"not {name}: {reason}" in said for name, reason in reasons[operation].items())


def test_an_argument_is_refused(abyssal: Callable[..., Any]) -> None:
    result = abyssal("doctor", "demo")
    assert (result.code, result.out) == (2, "")
    assert "unexpected extra argument" in result.err
