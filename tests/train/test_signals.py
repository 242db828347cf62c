"""Ctrl-C, SIGTERM and SIGKILL, at any moment: what was saved is whole, and the run goes on to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from abyssal.checkpoint.state import check_state, states
from abyssal.config import RunConfig
from abyssal.errors import Stopped
from abyssal.train import loop
from abyssal.train.signals import StopSignals

pytestmark = pytest.mark.slow

SILENT = Console(quiet=True)
#: Runs `abyssal ARGUMENTS` and sends itself signals in the middle of the fifth step, so no test waits for a moment.
SIGNALLED = """
import os, sys
from abyssal.cli.main import main
from abyssal.train import loop
loop.peak_flops = lambda config, device: 1e12
numbers, step, calls = [int(n) for n in sys.argv[1].split(",")], loop.train_step, 0
def signalled_step(*arguments, **options):
    global calls
    calls += 1
    if calls == 5:
        for number in numbers:
            os.kill(os.getpid(), number)
    return step(*arguments, **options)
loop.train_step = signalled_step
sys.exit(main(sys.argv[2:]))
"""
#: The same, killed where the state of step 6 is being written: in DCP's files, before the checksums, at the rename.
KILLED = """
import os, signal, sys
from abyssal.checkpoint.state import save
from abyssal.cli.main import main
from abyssal.files import atomic
from abyssal.train import loop
loop.peak_flops = lambda config, device: 1e12
module, name = (atomic if sys.argv[1] == "_put_in_place" else save), sys.argv[1]
original = getattr(module, name)
def deadly(*arguments, **options):
    if "step-00000006" in "".join(str(path) for path in (loop_root.iterdir() if loop_root.is_dir() else ())):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
from pathlib import Path
loop_root = Path(sys.argv[-1]) / "checkpoints"
setattr(module, name, deadly)
sys.exit(main(sys.argv[2:]))
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def losses(path: Path) -> list[tuple[Any, ...]]:
    records = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], *r["mtp_losses"], r["gradient_norm"]) for r in records if "loss" in r]


def assert_equal_runs(first: Path, second: Path) -> None:
    assert losses(first) == losses(second)
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (first, second)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"])
def test_first_signal_saves_after_the_step_and_the_run_goes_on_to_the_bit(
    small_run: RunConfig, small_recipe: Path, tmp_path: Path, number: int, code: int
) -> None:
    cut = tmp_path / "cut"
    finished = run(SIGNALLED, int(number), "train", small_recipe, "--out", cut)
    assert finished.returncode == code, finished.stderr
    assert "stopping: this step is finished and saved first" in finished.stderr
    assert f"go on with: abyssal train {small_recipe} --out {cut} --resume" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert [p.name for p in (cut / "checkpoints").iterdir() if p.name[-1] != "3"] == ["step-00000005"]
    assert len(losses(cut)) == 5
    loop.resume(cut, SILENT)
    loop.start(small_run, tmp_path / "whole", SILENT)
    assert_equal_runs(cut, tmp_path / "whole")


def test_second_signal_ends_at_once(small_recipe: Path, tmp_path: Path) -> None:
    finished = run(SIGNALLED, "2,2", "train", small_recipe, "--out", tmp_path / "cut")
    assert finished.returncode == 130, finished.stderr
    assert "Traceback" not in finished.stderr
    assert len(losses(tmp_path / "cut")) == 4
    assert not (tmp_path / "cut" / "checkpoints" / "step-00000005").exists()


@pytest.mark.parametrize("point", ["ReproducibleWriter", "render", "_put_in_place"])
def test_killed_while_a_state_is_written_resumes_to_the_bit(
    small_run: RunConfig, small_recipe: Path, tmp_path: Path, point: str
) -> None:
    cut = tmp_path / "cut"
    finished = run(KILLED, point, "train", small_recipe, "--out", cut)
    assert finished.returncode == -signal.SIGKILL, finished.stderr
    left = [path.name for path in (cut / "checkpoints").iterdir()]
    assert [name for name in left if name.startswith("step")] == ["step-00000003"]
    assert any(name.startswith(".step-00000006.writing-") for name in left)
    loop.resume(cut, SILENT)
    assert {path.name[0] for path in (cut / "checkpoints").iterdir()} == {"s"}
    for state in states(cut / "checkpoints"):
        check_state(state)
    loop.start(small_run, tmp_path / "whole", SILENT)
    assert_equal_runs(cut, tmp_path / "whole")


def test_signals_are_noted_once_and_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals() as signals:
        signals.stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested == signal.SIGTERM
        signals.stop()  # not before all ranks have agreed
        assert signals.agree(lambda own: own) == signal.SIGTERM
        with pytest.raises(Stopped) as caught:
            signals.stop()
    assert caught.value.signal == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert "once more ends at once" in capfd.readouterr().err


def test_signal_that_comes_while_ranks_agree_is_kept_for_the_next_time() -> None:
    def most(own: int) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return own

    with StopSignals(speaks=False) as signals:
        assert signals.agree(most) is None
        signals.stop()
        assert signals.agree(lambda own: own) == signal.SIGTERM


def test_first_signal_of_a_rank_that_has_agreed_already_does_not_end_it_at_once() -> None:
    """A launcher signals one rank after another, and the first may be heard before the last is sent its own."""
    with StopSignals(speaks=False) as signals:
        assert signals.agree(lambda own: max(own, signal.SIGTERM)) == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.agree(lambda own: own) == signal.SIGTERM


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    seen = []

    def enter() -> None:
        with StopSignals() as signals:
            seen.append((signals.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, signal.getsignal(signal.SIGINT))]
