"""Ranks killed and stopped under torchrun: each time the run goes on by itself and ends as the undisturbed one.

    python bench/kill_ranks.py [--ranks 4] [--times 10] [--seed 0]

First a run is left alone. Then one is disturbed: odd kills hit a random rank at a random moment of a step, even ones
while a training state is being written; then one rank is stopped (SIGSTOP). Its losses and weights are compared to the
bit with those of the undisturbed run. Last, two torchruns share a run (`--nnodes 1:2`), and one of them is killed with
all its ranks: the other goes on with half of the ranks, and losses agree to 1e-8 (the compute dtype is float64 there).
The seconds from each blow to the name of the rank, and to the first step after it, are printed and recorded.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ranks.launcher import QUICK, Torchrun, losses
from record import record

BETWEEN = 6  # steps that are made between two blows, at least
FIELDS: dict[str, Any] = {
    "train.compute_dtype": "float32",
    "checkpoint.every_steps": 4,
    "evaluation.every_steps": 1000,
    "parallel.ep_size": 2,
}
TOLD = re.compile(r"error: (rank \d+) \(process \d+ on \S+\): ([^;]+);")


class Blows:
    """What is done to a run, and how long it took to be told and to go on."""

    def __init__(self, torchrun: Torchrun) -> None:
        self.torchrun = torchrun
        self.rows: list[dict[str, Any]] = []

    def strike(self, where: str, blow: Callable[[], str]) -> None:
        """Strike, and wait for the name of a rank and for a step behind all that were made before."""
        told, steps, begin = len(TOLD.findall(self.torchrun.output)), self.torchrun.steps(), time.monotonic()
        name = blow()
        self.torchrun.until(lambda: len(TOLD.findall(self.torchrun.output)) > told, "named")
        named = time.monotonic() - begin
        self.torchrun.until(lambda: self.torchrun.steps() > steps, "going on")
        took, sentence = time.monotonic() - begin, " ".join(TOLD.findall(self.torchrun.output)[-1])
        assert name in sentence, f"{name} was struck, but told is: {sentence}"
        self.rows.append({"where": where, "told": sentence, "named_s": round(named, 2), "goes_on_s": round(took, 1)})
        print(f"{len(self.rows):3d}  {where}: {sentence}; named after {named:.1f} s, a new step after {took:.1f} s")

    def further(self) -> None:
        """Let the run make some steps, and then a part of one."""
        before = self.torchrun.steps()
        self.torchrun.until(lambda: self.torchrun.steps() >= before + BETWEEN, "further")
        time.sleep(random.random() * 0.2)

    def kill_in_a_step(self, number: int) -> None:
        """Send a signal to any rank at any moment."""
        self.further()
        self.strike("in a step", lambda: self._hit(number))

    def kill_while_writing(self) -> None:
        """Kill any rank while a state is half-written."""
        self.further()
        self.torchrun.until(self.torchrun.is_writing, "writing a state")
        self.strike("while a state is written", lambda: self._hit(signal.SIGKILL))

    def _hit(self, number: int) -> str:
        rank = random.choice(sorted(self.torchrun.workers()))
        self.torchrun.disturb(rank, number)
        return f"rank {rank}"


def finish(torchrun: Torchrun) -> None:
    """Wait for the end, which must be a good one."""
    code = torchrun.wait(1200)
    assert code == 0, torchrun.output


def weights(run: Path) -> bytes:
    """Return the bytes of a run's model."""
    return (run / "model" / "model.safetensors").read_bytes()


def same_ranks(folder: Path, ranks: int, times: int) -> list[dict[str, Any]]:
    """Kill ranks so many times and stop one, and compare with an undisturbed run."""
    fields = {**FIELDS, "train.tokens": (times + 3) * 2 * BETWEEN * 16 * 24}
    begin = time.monotonic()
    with Torchrun(folder / "undisturbed", ranks, fields) as torchrun:
        finish(torchrun)
    print(
        f"undisturbed: {len(losses(folder / 'undisturbed'))} steps on {ranks} ranks, {time.monotonic() - begin:.0f} s"
    )
    with Torchrun(folder / "disturbed", ranks, fields) as torchrun:
        blows = Blows(torchrun)
        for number in range(times):
            blows.kill_in_a_step(signal.SIGKILL) if number % 2 == 0 else blows.kill_while_writing()
        blows.kill_in_a_step(signal.SIGSTOP)
        finish(torchrun)
    assert losses(folder / "disturbed") == losses(folder / "undisturbed"), "the losses differ"
    assert weights(folder / "disturbed") == weights(folder / "undisturbed"), "the weights differ"
    print("losses and weights are equal to the bit")
    return blows.rows


def fewer_ranks(folder: Path, ranks: int) -> dict[str, Any]:
    """Kill one of two torchruns, and compare with an undisturbed run of all ranks."""
    fields = {**FIELDS, "train.compute_dtype": "float64", "train.tokens": 8 * BETWEEN * 16 * 24}
    with Torchrun(folder / "whole", ranks, fields) as torchrun:
        finish(torchrun)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launch = ["--nnodes=1:2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=fewer"]
    launch += ["--max-restarts=9"]
    run = folder / "shrunk"
    with (
        Torchrun(run, ranks // 2, fields, [*launch, f"--rdzv-conf={QUICK},is_host=1"], "first") as first,
        Torchrun(run, ranks // 2, fields, [*launch, f"--rdzv-conf={QUICK},is_host=0"], "second") as second,
    ):
        blows = Blows(first)
        blows.further()

        def both() -> str:
            second.kill()
            return "rank "

        blows.strike("one of two torchruns, with its ranks", both)
        finish(first)
        assert f"{ranks // 2} ranks: " in first.output
    worst = max(abs(a[1] - b[1]) for a, b in zip(losses(run), losses(folder / "whole"), strict=True))
    assert worst <= 1e-8, f"losses differ by {worst}"
    print(f"gone on with {ranks // 2} of {ranks} ranks; losses differ by at most {worst:.1e}")
    return {**blows.rows[0], "worst_loss_difference": worst}


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        rows = same_ranks(Path(name), arguments.ranks, arguments.times)
        shrunk = fewer_ranks(Path(name), arguments.ranks)
    medians = {key: statistics.median(row[key] for row in rows) for key in ("named_s", "goes_on_s")}
    figures = {"ranks": arguments.ranks, "blows": rows, "median": medians, "fewer ranks": shrunk}
    print(f"written to {record('kill-ranks', ' '.join(['python', 'bench/kill_ranks.py', *sys.argv[1:]]), figures)}")


if __name__ == "__main__":
    main()
