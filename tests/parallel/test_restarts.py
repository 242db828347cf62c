"""A run under torchrun that loses ranks goes on by itself and ends as if nothing had happened."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from ranks.launcher import Torchrun, losses
from ranks.training import train_runs

pytestmark = pytest.mark.slow

FIELDS: dict[str, Any] = {
    "train.compute_dtype": "float32",
    "train.tokens": 48 * 16 * 24,
    "checkpoint.every_steps": 4,
    "parallel.ep_size": 2,
    "parallel.silence_s": 20,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train_runs(2, folder, {"run": FIELDS})
    return folder / "run"


@pytest.mark.timeout(900)  # four starts of torchrun
def test_killed_and_stopped_ranks_are_named_and_the_run_ends_as_an_undisturbed_one(
    tmp_path: Path, undisturbed: Path
) -> None:
    with Torchrun(tmp_path / "run", 2, FIELDS) as torchrun:
        torchrun.until(lambda: torchrun.steps() >= 6, "in step 7")
        torchrun.disturb(1, signal.SIGKILL)
        torchrun.until(lambda: torchrun.steps() >= 14 and torchrun.is_writing(), "writing a state")
        torchrun.disturb(0, signal.SIGKILL)
        torchrun.until(lambda: torchrun.steps() >= 24, "in step 25")
        torchrun.disturb(1, signal.SIGSTOP)
        assert torchrun.wait() == 0, torchrun.output
        output = torchrun.output
    told = re.findall(
        r"error: rank (\d) \(process \d+ on \S+\): (its process ended|gave no sign of life for 20 s);", output
    )
    assert told == [("1", "its process ended"), ("0", "its process ended"), ("1", "gave no sign of life for 20 s")]
    assert output.count("started again by its launcher") == 3
    assert losses(tmp_path / "run") == losses(undisturbed)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (tmp_path / "run", undisturbed)]
    assert weights[0] == weights[1]
