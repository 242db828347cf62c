"""`abyssal serve` as a process of its own, for the benchmarks that are its clients."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NAME = "served"
START_S = 300


@dataclass(frozen=True)
class Served:
    """A server that listens."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path  # its standard error

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def until(self, name: str, value: float, timeout_s: float = 60) -> None:
        """Wait until a metric has a value.

        Raises:
            AssertionError: it did not come to that in time.
        """
        end = time.monotonic() + timeout_s
        while (found := self.metric(name)) != value:
            assert time.monotonic() < end, f"{name} is {found} after {timeout_s} s, not {value}"
            time.sleep(0.02)


@contextlib.contextmanager
def serving(model: Path, *options: str) -> Iterator[Served]:
    """Serve a model directory at a free port under the name `NAME`, and end the process afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        arguments = [sys.executable, "-m", "abyssal", "serve", str(model), "--port", "0", "--name", NAME, *options]
        with log.open("wb") as errors:
            process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            end = time.monotonic() + START_S
            while not (found := re.search(r"http://[\d.]+:\d+", log.read_text())):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the server did not start:\n{log.read_text()}")
                time.sleep(0.05)
            yield Served(process, found[0], log)
        finally:
            process.kill()
            process.wait()
