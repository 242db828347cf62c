"""A run on many ranks is the run of one process: gradients, losses, loads and validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ranks.training import LIMITS, Run, train_runs

pytestmark = pytest.mark.slow

EXACT, ROUNDED = {"train.compute_dtype": "float64"}, {"train.compute_dtype": "float32"}
MUON = {**EXACT, "optimizer.name": "muon"}
#: For each number of ranks: recipe fields, beside a compute dtype.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp 2, ZeRO-1": EXACT,
        "dp 2, ZeRO-2": {**EXACT, "parallel.zero_stage": 2},
        "dp 2, ZeRO-3": {**EXACT, "parallel.zero_stage": 3},
        "ep 2": {**EXACT, "parallel.ep_size": 2},
        "ep 2, fp32": {**ROUNDED, "parallel.ep_size": 2},
        "dp 2, ZeRO-2, Muon": {**MUON, "parallel.zero_stage": 2},
    },
    4: {
        "dp 4, ZeRO-1": EXACT,
        "dp 4, ZeRO-3": {**EXACT, "parallel.zero_stage": 3},
        "ep 4": {**EXACT, "parallel.ep_size": 4, "parallel.zero_stage": 2},
        "ep 2, replicated": {**EXACT, "parallel.ep_size": 2, "parallel.dp_replicate_size": 2},
        "ep 2 * dp 2, ZeRO-2, fp32": {**ROUNDED, "parallel.ep_size": 2, "parallel.zero_stage": 2},
        "ep 2 * dp 2, Muon": {**MUON, "parallel.ep_size": 2},
    },
    8: {
        "ep 8": {**EXACT, "parallel.ep_size": 8},
        "ep 2 * dp 4, ZeRO-3": {**EXACT, "parallel.ep_size": 2, "parallel.zero_stage": 3},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Run]:
    return train_runs(1, folder, {"float64": EXACT, "float32": ROUNDED, "muon": MUON})


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_trains_as_one_process(world_size: int, folder: Path, alone: dict[str, Run]) -> None:
    for name, run in train_runs(world_size, folder, LAYOUTS[world_size]).items():
        fields = LAYOUTS[world_size][name]
        dtype = fields["train.compute_dtype"]
        expected, (gradient_limit, loss_limit) = alone[fields.get("optimizer.name", dtype)], LIMITS[dtype]
        assert len(run.of("loss")) == 20
        assert run.gradient_error(expected).size <= gradient_limit, (name, run.gradient_error(expected))
        assert run.loss_error(expected).size <= loss_limit, (name, run.loss_error(expected))
        if dtype == "float64":
            assert run.of("expert_load") == expected.of("expert_load"), name
