"""Runs of `abyssal train` under torchrun, whose ranks are killed or stopped from outside, and what they came to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ranks.training import options, write_corpus

#: One torchrun, of this machine alone.
ALONE = ("--standalone", "--max-restarts", "99")
#: Settings with which torchrun finds out within seconds that another of its agents is gone, not within a minute.
QUICK = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"


class Torchrun:
    """One torchrun and its workers, in a session of their own, ended with the context."""

    def __init__(
        self, run: Path, ranks: int, fields: dict[str, Any], launch: Sequence[str] = ALONE, name: str = "output"
    ) -> None:
        """Train in the folder `run` with as many ranks; what they write goes to a file of that name beside it."""
        self.run, self.log = run, run.with_name(f"{run.name}.{name}")
        write_corpus(run.parent)
        arguments = ["--nproc-per-node", str(ranks), *launch]
        train = ["-m", "abyssal", "train", "demo", "--out", str(run), *options(run.parent, fields)]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *arguments, *train],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        """It has been started."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill what is left of it."""
        self.kill()

    @property
    def output(self) -> str:
        """What it and its ranks have written."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def workers(self) -> dict[int, int]:
        """Return the process of each rank."""
        found = {}
        for pid in children(self.process.pid):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            for entry in environment:
                if entry.startswith(b"RANK="):
                    found[int(entry[5:])] = pid
        return found

    def steps(self) -> int:
        """Return the last step that stands in the metrics, 0 before any."""
        return max((line["step"] for line in metrics(self.run) if "loss" in line), default=0)

    def is_writing(self) -> bool:
        """Whether a training state stands half-written."""
        return any((self.run / "checkpoints").glob(".step-*.writing-*"))

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 240.0) -> None:
        """Wait for a condition, but not longer than the run lasts."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.output[-3000:]}"
            assert time.monotonic() < deadline, f"not {what} within {seconds:.0f} s:\n{self.output[-3000:]}"
            time.sleep(0.002)

    def disturb(self, rank: int, number: int) -> None:
        """Send a rank a signal, and wait until it is gone."""
        pid = self.workers()[rank]
        os.kill(pid, number)
        self.until(lambda: self.workers().get(rank) != pid, "rid of the rank")

    def kill(self) -> None:
        """Kill it with all its workers, as where a machine is lost."""
        for pid in (self.process.pid, *self.workers().values()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, seconds: float = 240.0) -> int:
        """Return the exit code once it has ended by itself."""
        return self.process.wait(seconds)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, without one that is being written."""
    path, found = run / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def losses(run: Path) -> list[tuple[float, ...]]:
    """Return what every step recorded that does not depend on time."""
    return [
        (line["step"], line["loss"], *line["mtp_losses"], line["gradient_norm"])
        for line in metrics(run)
        if "loss" in line
    ]
