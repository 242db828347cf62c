"""A rank that died, stopped or hangs is named, and the others end; ranks that are late, or leave, are left alone."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import tempfile
import time
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from abyssal.errors import DataError, RankError
from abyssal.ranks.heartbeat_monitor import Failure, Heartbeat, HeartbeatMonitor, Mark
from abyssal.ranks.heartbeat_process import MARK, HeartbeatProcess, Settings, is_stopped
from abyssal.ranks.join import join
from ranks import run_ranks

pytestmark = pytest.mark.slow

SILENCE_S = 6.0
WAY_OUT = "started again, the run goes on from its newest training state"


def monitored(ranks: int, now: float = 0.0) -> HeartbeatMonitor:
    """Return the monitor of as many ranks, with a limit of 10 s, all of which have come."""
    monitor = HeartbeatMonitor(ranks, 10.0, now)
    for rank in range(ranks):
        monitor.come(rank, f"process {rank + 5} on host", now)
    return monitor


def hear(monitor: HeartbeatMonitor, now: float, **heartbeats: Heartbeat) -> Failure | None:
    """Let some ranks be heard, by names such as `r2`, and return what follows."""
    for name, heartbeat in heartbeats.items():
        monitor.hear(int(name[1:]), heartbeat, now)
    return monitor.judge(now)


def at(number: int, name: str = "", **fields: Any) -> Heartbeat:
    return Heartbeat(Mark(number, name, fields.pop("may_take_long", False)), **fields)


def test_silent_rank_is_named_only_after_the_limit() -> None:
    monitor = monitored(2, now=100.0)
    assert hear(monitor, 104.0, r0=at(1), r1=at(1)) is None
    assert hear(monitor, 113.9, r0=at(2)) is None
    assert hear(monitor, 114.1, r0=at(3)) == Failure(
        f"rank 1 (process 6 on host): gave no sign of life for 10 s; {WAY_OUT}", 1
    )


def test_rank_that_never_came_is_named() -> None:
    monitor = HeartbeatMonitor(1, 10.0, now=0.0)
    assert monitor.judge(9.9) is None
    assert monitor.judge(10.1) == Failure(f"rank 0: gave no sign of life for 10 s; {WAY_OUT}", 0)


def test_rank_whose_process_ended_is_named_unless_it_was_done() -> None:
    monitor = monitored(2)
    hear(monitor, 1.0, r0=at(1, done=True), r1=at(1))
    assert monitor.ended(0) is None
    assert monitor.ended(1) == Failure(f"rank 1 (process 6 on host): its process ended; {WAY_OUT}", 1)
    assert hear(monitor, 10.5, r1=at(2)) is None, "a rank that is done may be silent"


def test_rank_that_does_not_lose_the_others_while_they_lose_it_is_named() -> None:
    monitor, stands = monitored(3), at(4, "backward")
    for now in range(1, 14):
        assert hear(monitor, float(now), r0=at(now, lost=True), r1=stands, r2=at(now, lost=True)) is None
    failure = hear(monitor, 13.1, r0=at(13, lost=True), r1=stands, r2=at(13, lost=True))
    assert failure is not None
    assert failure.sentence.startswith("rank 1 (process 6 on host): hangs in 'backward' since 12 s: it lives, but does")


def test_ranks_that_all_lose_one_another_blame_nobody() -> None:
    monitor = monitored(2)
    for now in range(1, 40):
        assert hear(monitor, float(now), r0=at(now, lost=True), r1=at(now, lost=True)) is None


def first_blamed(marks: dict[str, Heartbeat], seconds: int = 60) -> tuple[int, Failure] | None:
    """Let ranks stand at marks for a minute, and return when one of them is named."""
    monitor = monitored(len(marks))
    for now in range(1, seconds):
        if failure := hear(monitor, float(now), **marks):
            return now, failure
    return None


def test_rank_that_all_others_wait_for_is_named_with_its_mark() -> None:
    blamed = first_blamed({"r0": at(9, "dispatch"), "r1": at(8, "layer 7"), "r2": at(9, "dispatch")})
    assert blamed is not None
    seconds, failure = blamed
    assert (seconds, failure.rank) == (17, 1)
    assert failure.sentence.startswith("rank 1 (process 6 on host): hangs in 'layer 7' since 16 s: it lives, but")


@pytest.mark.parametrize(
    "marks",
    [
        {"r0": at(8, "layer 7"), "r1": at(8, "layer 7")},  # nobody is ahead
        {"r0": at(9, "batch"), "r1": at(8, "evaluation", may_take_long=True)},
        {"r0": at(9, "batch", done=True), "r1": at(8, "layer 7")},
    ],
)
def test_ranks_that_stand_for_a_good_reason_are_not_blamed(marks: dict[str, Heartbeat]) -> None:
    assert first_blamed(marks) is None


def test_nobody_is_blamed_while_any_rank_moves() -> None:
    monitor = monitored(2)
    for now in range(1, 60):
        assert hear(monitor, float(now), r0=at(now, "step"), r1=at(1, "layer 7")) is None


def test_stopped_process_is_seen() -> None:
    pid = os.fork()
    if pid == 0:
        while True:
            time.sleep(1)
    try:
        assert not is_stopped(pid)
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        assert is_stopped(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_strangers_are_not_heard() -> None:
    """What knocks at the first rank's port, and says anything but the launch's token, changes nothing."""
    own, other = socket.socketpair()
    with tempfile.TemporaryFile() as memory, own:
        memory.truncate(MARK.size)
        settings = Settings(0, 2, True, 60.0, "token", os.getpid(), ("127.0.0.1", 1))
        process = HeartbeatProcess(settings, other, mmap(memory.fileno(), MARK.size))
        process._listen()
        port = json.loads(own.recv(1000))["address"][1]
        said = [
            b"GET / HTTP/1.1\r\n\r\n",
            b"17\n",
            b"[1, 2]\n",
            b'{"token": "other", "rank": 1, "place": ""}\n',
            b"x" * 99999,
        ]
        for line in said:
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(line)
                for _ in range(3):
                    for key, _ in process.selector.select(0.1):
                        key.data(key.fileobj)
        assert (process.clients, process.failure) == ([], None)
        assert process.monitor is not None
        assert process.monitor.seen[1].place == ""
        for key in list(process.selector.get_map().values()):
            key.fileobj.close()
        process.selector.close()


# On ranks: each returns how it ended, and what was written to stderr.


def _disturbed(what: str, folder: str) -> tuple[str, str]:
    """Sum over three ranks until the last of them meets its fate; returns how this one ended, and what it said."""
    said = Path(folder, os.environ["RANK"])
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    timeout_s = 2.0 if what == "hangs" else 300.0
    try:
        with join(silence_s=SILENCE_S, timeout_s=timeout_s) as ranks:
            dist.all_reduce(torch.ones(1))
            for name in ("forward", "backward", "compile" if what == "holds its interpreter" else "forward"):
                ranks.mark(name)
            if ranks.rank == 2:
                _meet_fate(what)
            ranks.mark("backward")
            dist.all_reduce(torch.ones(1))
    except (SystemExit, Exception) as error:
        time.sleep(0.2)
        return f"{type(error).__name__}: {error}", said.read_text()
    return "done", said.read_text()


def _meet_fate(what: str) -> None:
    if what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what.startswith("hangs"):
        time.sleep(1e6)
    elif what == "meets a defect":
        raise ValueError("a defect")
    elif what == "meets a fault":
        raise DataError("shard 3 is damaged")
    elif what == "is late":
        time.sleep(1.3 * SILENCE_S)
    elif what == "holds its interpreter":
        ctypes.PyDLL(None).sleep(round(2 * SILENCE_S))  # of PyDLL's functions none lets other threads run


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("dies", "its process ended"),
        ("stops", "gave no sign of life for 6 s"),
        ("hangs", "hangs in 'forward' since "),  # the others' collective runs out of its time
        ("hangs at a mark", "hangs in 'forward' since "),  # it has much time left
    ],
)
def test_lost_rank_is_named_once_and_all_others_end(tmp_path: Path, what: str, sentence: str) -> None:
    *others, lost = run_ranks(3, _disturbed, what, str(tmp_path), dying=range(3))
    assert {end[0] for end in others if end is not None} <= {f"SystemExit: {RankError.exit_code}"}  # or it was killed
    assert lost is None
    (told,) = [
        line for number in range(3) for line in (tmp_path / str(number)).read_text().splitlines() if line[:5] == "error"
    ]
    assert told.startswith("error: rank 2 (process ")
    assert f"): {sentence}" in told


@pytest.mark.parametrize(
    ("what", "error"), [("meets a defect", "ValueError: a defect"), ("meets a fault", "DataError: shard 3 is damaged")]
)
def test_rank_that_reports_its_own_fault_is_not_accused(tmp_path: Path, what: str, error: str) -> None:
    ended = run_ranks(3, _disturbed, what, str(tmp_path))
    assert ended[2][0] == error
    assert [end for end, _ in ended[:2]] == ["SystemExit: 1"] * 2
    assert not any("error: rank" in said for _, said in ended)


@pytest.mark.parametrize("what", ["is late", "holds its interpreter"])
def test_rank_that_works_for_longer_than_it_may_be_silent_is_waited_for(tmp_path: Path, what: str) -> None:
    assert [end for end, _ in run_ranks(3, _disturbed, what, str(tmp_path))] == ["done"] * 3
