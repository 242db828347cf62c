"""A rank's heartbeats, which a small process beside it gives, and what it hears of the failures of others.

A collective does not say who is missing, and on many backends it waits for minutes. The heartbeats do not go through
this process, whose interpreter may be held up by a native call for as long as that takes.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from mmap import mmap
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from abyssal.errors import RankError
from abyssal.ranks.heartbeat_monitor import Failure
from abyssal.ranks.heartbeat_process import GRACE_S, MARK, Connection, Settings
from abyssal.ranks.launch import Launch

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

#: How long the process may take to start, seconds.
START_S = 60.0
#: For so many times the limit of silence, a rank that has lost others waits to hear who failed.
WAIT = 1.5


class Heartbeats:
    """The process beside this rank."""

    def __init__(self, launch: Launch, store: Store, token: str, silence_s: float) -> None:
        """Start it, and let it meet those of the other ranks, through `store`; all ranks of the launch call this.

        Raises:
            RankError: it does not start.
        """
        self.rank, self.silence_s = launch.rank, silence_s
        self._count, self._names, self._done = 0, set[str](), False
        self._failure: Failure | None = None
        own, other = socket.socketpair()
        self._control = Connection(own)
        with tempfile.TemporaryFile() as memory, other:
            memory.truncate(MARK.size)
            self._mark = mmap(memory.fileno(), MARK.size)
            self._process = _start(launch, token, silence_s, (other.fileno(), memory.fileno()))
        if launch.rank == 0:
            messages = self._receive(START_S)
            if not messages:
                raise RankError("rank 0: its heartbeat process did not start")
            store.set("address", json.dumps(messages[0]["address"]))
        host, port = json.loads(store.get("address"))
        self._control.send({"connect": [host or launch.host, port]})

    def mark(self, name: str, *, may_take_long: bool) -> None:
        """Say what the main thread does next; see `Ranks.mark`."""
        self._count += 1
        comes_again = name in self._names
        self._names.add(name)
        text = name.encode()[:200]
        self._mark[:] = MARK.pack(self._count, may_take_long or not comes_again, len(text), text)

    def report(self, sentence: str) -> bool:
        """Make a fault of this rank's own the failure of the run, and return whether there was none yet."""
        self._control.send({"report": sentence})
        failure = self._await_failure(GRACE_S)
        return failure is None or failure.reporter == self.rank

    def report_lost(self) -> Failure | None:
        """Say that this rank has lost contact with others, and wait for the failure; none if there is none in time.

        A launcher that has seen a rank end terminates the others at once; who failed is said before. For the main
        thread to call, as signals are its own.
        """
        self._control.send({"lost": True})
        return self._await_failure(WAIT * self.silence_s)

    def done(self) -> None:
        """Say that this rank's work is done: others may leave before it."""
        self._done = True
        self._control.send({"done": True})

    def close(self) -> None:
        """Let the process end."""
        self._control.stream.close()
        if self._done:  # otherwise it has something to tell others yet
            self._process.wait()

    def _await_failure(self, seconds: float) -> Failure | None:
        """Return the failure once it is known; shortly after SIGTERM this gives up."""
        deadline = time.monotonic() + seconds

        def hurry(number: int, frame: FrameType | None) -> None:
            nonlocal deadline
            deadline = min(deadline, time.monotonic() + GRACE_S)

        before = signal.signal(signal.SIGTERM, hurry)
        try:
            while self._failure is None and time.monotonic() < deadline:
                for message in self._receive(0.05):
                    self._failure = Failure(*message["failure"])
        finally:
            signal.signal(signal.SIGTERM, before)
        return self._failure

    def _receive(self, seconds: float) -> list[dict[str, Any]]:
        """Return what the process says within some time."""
        ready, _, _ = select.select([self._control.stream], [], [], seconds)
        messages = self._control.receive() if ready else []
        if messages is None:  # it has been killed
            time.sleep(seconds)
        return messages or []


def _start(launch: Launch, token: str, silence_s: float, files: tuple[int, int]) -> subprocess.Popen[bytes]:
    """Start the process with nothing but our own source on its path, in a session that Ctrl-C does not reach."""
    source = str(Path(__file__).parents[2])
    program = f"import sys; sys.path.append({source!r}); from abyssal.ranks.heartbeat_process import main; main()"
    settings = Settings(
        launch.rank,
        launch.world_size,
        launch.local_rank == 0,
        silence_s,
        token,
        os.getpid(),
        (launch.host, launch.port),
    )
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", program, *map(str, files), json.dumps(settings)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=files,
        start_new_session=True,
    )
