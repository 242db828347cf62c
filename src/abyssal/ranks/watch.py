"""Who of a run's ranks lives: each tells it to a store, some look, and one that died or hangs ends the run by its name.

A collective does not say who is missing, and on many backends it waits for minutes. So every rank has a thread that
writes a sign of life into the store of the launch and looks at those of a few others. The first to miss one writes the
verdict there, and every rank that reads it ends, so that the launcher can start all of them again.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from abyssal.errors import RankError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

#: How long the main thread has, once the verdict is known, to end by itself, seconds.
GRACE_S = 5.0
#: Signs of life that a rank gives within the time after which it counts as silent.
BEATS = 15
#: A rank that lives, but does not miss the others, is blamed after so many times that time: silent ones come first.
HANG = 1.2
#: And for so many times that time a rank that misses others waits for the verdict.
WAIT = 1.5
WAY_OUT = "started again, the run goes on from its newest training state"
_VERDICT = "verdict"


@dataclass(frozen=True)
class Beat:
    """A sign of life."""

    machine: str  # equal where a process can be seen, and killed, by its number
    host: str
    pid: int
    count: int
    lost: bool = False  # its main thread has lost contact with the others, and waits for the verdict


@dataclass(frozen=True)
class Verdict:
    """Why the run ends."""

    sentence: str
    accused: int | None = None  # the rank that others found dead or silent; none: it has told its fault itself


class Signs:
    """What was seen last of some ranks, and what follows from it."""

    def __init__(self, ranks: Sequence[int], silence_s: float, now: float) -> None:
        """Begin at `now`, seconds of a clock that stands still while the machine sleeps."""
        self.silence_s = silence_s
        self.seen: dict[int, tuple[Beat | None, float]] = dict.fromkeys(ranks, (None, now))
        self._first_loss: float | None = None

    def judge(self, beats: dict[int, Beat], now: float, lives: Callable[[Beat], bool]) -> Verdict | None:
        """Take in the newest signs, and return a verdict where a rank is dead, silent, or alone in not missing others.

        Args:
            beats: by rank; ranks that gave none yet are left out.
            now: seconds.
            lives: whether the process of a sign still exists; true where that cannot be known.
        """
        for rank, (last, _) in self.seen.items():
            beat = beats.get(rank)
            if beat is not None and beat != last:
                self.seen[rank] = (beat, now)
        for rank, (beat, since) in self.seen.items():
            if beat is not None and not lives(beat):
                return self._verdict(rank, "its process ended")
            if now - since > self.silence_s:
                return self._verdict(rank, f"gave no sign of life for {self.silence_s:.0f} s")
        return self._judge_hanging(now)

    def _judge_hanging(self, now: float) -> Verdict | None:
        """Blame who lives, but does not miss the others although these have long missed it."""
        there = [rank for rank, (beat, _) in self.seen.items() if beat is None or not beat.lost]
        if len(there) == len(self.seen):
            return None
        self._first_loss = self._first_loss or now
        if there and now - self._first_loss > HANG * self.silence_s:
            return self._verdict(there[0], "hangs: it lives, but does not come to where the others wait for it")
        return None

    def _verdict(self, rank: int, what: str) -> Verdict:
        beat, _ = self.seen[rank]
        place = f" (process {beat.pid} on {beat.host})" if beat is not None else ""
        return Verdict(f"rank {rank}{place}: {what}; {WAY_OUT}", rank)


class Watch:
    """This rank's signs of life, and its look at those of others, by a thread of its own.

    The first rank looks at all, the second at the first, and each at those of its own machine, whose processes it can
    see end. One that is silent there is killed, since a stopped process does not end by itself.
    """

    def __init__(self, store: Store, rank: int, watched: Sequence[int], silence_s: float) -> None:
        """Speak through `store`, which nobody else uses: a wait in another thread would hold up the signs."""
        self.store, self.rank, self.silence_s = store, rank, silence_s
        self.beat_s = silence_s / BEATS
        store.set_timeout(timedelta(seconds=silence_s))
        self._own = Beat(machine(), socket.gethostname(), os.getpid(), 0)
        self._signs = Signs([other for other in watched if other != rank], silence_s, time.monotonic())
        self._known = set[int]()
        self._judges, self._lost = True, False
        self._end, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop_judging(self) -> None:
        """Go on giving signs, but end nothing any more: this rank's work is done, and others may leave before it."""
        self._judges = False

    def stop(self) -> None:
        """End the thread."""
        self.give_way()
        self._thread.join()

    def give_way(self) -> None:
        """Leave the end of this process to its main thread."""
        self._end.set()
        self._wake.set()

    def tell(self, sentence: str) -> bool:
        """Make a fault of this rank's own the verdict, and return whether there was none yet."""
        with suppress(RuntimeError):  # the store is gone, and with it all who could read it
            return self._pass(Verdict(sentence))
        return True

    def miss(self) -> Verdict | None:
        """Say that this rank has lost contact with others, and wait for the verdict; none if there is none in time.

        A launcher that has seen a rank end terminates the others at once; who did what is told before. For the main
        thread to call, as signals are its own.
        """
        self._lost = True
        self._wake.set()
        deadline = time.monotonic() + WAIT * self.silence_s

        def hurry(number: int, frame: FrameType | None) -> None:
            nonlocal deadline
            deadline = min(deadline, time.monotonic() + GRACE_S)

        before = signal.signal(signal.SIGTERM, hurry)
        try:
            while time.monotonic() < deadline:
                with suppress(RuntimeError):
                    if (found := self._read()) is not None:
                        return found
                time.sleep(0.02)
            return None
        finally:
            signal.signal(signal.SIGTERM, before)

    # The thread

    def _run(self) -> None:
        while True:
            try:
                verdict = self._look()
            except RuntimeError as error:
                if self._end.is_set() or not self._judges:
                    return
                first_line = str(error).partition("\n")[0]
                verdict = Verdict(f"rank {self.rank}: the store of the launch is gone ({first_line}); {WAY_OUT}")
                _print(verdict.sentence)
            if verdict is not None and self._judges:
                self._leave(verdict)
            self._wake.wait(self.beat_s)
            if self._end.is_set():
                return
            self._wake.clear()

    def _look(self) -> Verdict | None:
        """Give a sign, and return the verdict, which this rank may have found itself."""
        count = self._own.count + 1
        self._own = Beat(self._own.machine, self._own.host, self._own.pid, count, self._lost)
        self.store.set(_key(self.rank), json.dumps(asdict(self._own)))
        if (found := self._read()) is not None or not self._judges:
            return found
        new = [rank for rank in self._signs.seen if rank not in self._known and self.store.check([_key(rank)])]
        self._known.update(new)
        known = sorted(self._known)
        texts = self.store.multi_get([_key(rank) for rank in known]) if known else []
        beats = {rank: Beat(**json.loads(text)) for rank, text in zip(known, texts, strict=True)}
        verdict = self._signs.judge(beats, time.monotonic(), self._lives)
        if verdict is None or not self._pass(verdict):
            return self._read()
        _print(verdict.sentence)
        return verdict

    def _lives(self, beat: Beat) -> bool:
        return beat.machine != self._own.machine or exists(beat.pid)

    def _leave(self, verdict: Verdict) -> None:
        """End this process, and the accused one where it is on this machine, whatever their main threads do."""
        if verdict.accused is not None and verdict.accused != self.rank:
            beat, _ = self._signs.seen.get(verdict.accused, (None, 0.0))
            if beat is not None and beat.machine == self._own.machine:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(beat.pid, signal.SIGKILL)
        if not self._end.wait(GRACE_S):
            sys.stdout.flush()
            os._exit(RankError.exit_code)

    # The verdict

    def _read(self) -> Verdict | None:
        if not self.store.check([_VERDICT]):
            return None
        return _parse(self.store.get(_VERDICT))

    def _pass(self, verdict: Verdict) -> bool:
        """Make this the verdict unless there is one already."""
        text = json.dumps({**asdict(verdict), "by": self.rank})  # so that two ranks' are never equal
        return self.store.compare_set(_VERDICT, "", text).decode() == text


def watched_ranks(rank: int, world_size: int, local_rank: int, local_world_size: int) -> list[int]:
    """Return the ranks that a rank looks at: all of them, or the first, or only those of its machine."""
    machine_mates = range(rank - local_rank, min(rank - local_rank + local_world_size, world_size))
    found = set(range(world_size)) if rank == 0 else {0, *machine_mates} if rank == 1 else set(machine_mates)
    return sorted(found - {rank})


def machine() -> str:
    """Return what tells this machine, and the part of it whose processes are seen here, from all others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode():x}"


def exists(pid: int) -> bool:
    """Whether a process of this machine still runs; one that has ended may wait for its parent to see it."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except OSError:  # not ours to signal, or not Linux
        return True


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _parse(text: bytes) -> Verdict:
    fields: dict[str, Any] = json.loads(text)
    return Verdict(fields["sentence"], fields["accused"])


def _print(sentence: str) -> None:
    os.write(2, f"error: {sentence}\n".encode())  # not print: the main thread may be in the middle of one
