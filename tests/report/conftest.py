"""Folders of runs, written without training anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECIPE = """
name = "{name}"
description = "one of the tests"
seed = {seed}

[model]
num_hidden_layers = 3

[train]
tokens = {tokens}

[schedule.learning_rate]
start = 0.0
segments = [{{shape = "linear", until = 0.1, to = 0.002}}]
"""

WriteRun = Callable[..., Path]


def record_of(step: int, **changes: Any) -> dict[str, Any]:
    """One step of a run with 2 MoE layers and 1 MTP module; layer 3 is the module's."""
    record = {
        "step": step,
        "sequences": 4 * step,
        "tokens": 128 * step,
        "loss": 6.0 / step**0.1,
        "mtp_losses": [6.5 / step**0.1],
        "balance_loss": 1.1,
        "gradient_norm": 1.0 + 1 / step,
        "learning_rate": 0.001,
        "max_violation": 0.5,
        "expert_load": {"2": [10 + step, 20, 30], "3": [30, 20, 10 + step]},
        "tokens_per_s": 64.0,
        "mfu": 0.25,
    }
    return {**record, **changes}


@pytest.fixture
def step_record() -> Callable[..., dict[str, Any]]:
    """The record of one step: step_record(3, loss=2.0)."""
    return record_of


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Write the folder of a run: write_run("a", records, seed=1)."""

    def write(name: str, records: list[Any] | None = None, *, seed: int = 0, samples: list[Any] | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        records = [record_of(step) for step in range(1, 13)] if records is None else records
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        (folder / "recipe.toml").write_text(RECIPE.format(name="small", seed=seed, tokens=128 * 12))
        if samples is not None:
            (folder / "samples.jsonl").write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
        return folder

    return write
