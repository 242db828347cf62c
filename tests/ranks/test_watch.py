"""A rank that died, stopped or hangs is named, and the others end; ranks that leave in good order are left alone."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from abyssal.errors import DataError, RankError
from abyssal.ranks.join import join
from abyssal.ranks.watch import BEATS, Beat, Signs, Verdict, Watch, exists, watched_ranks
from ranks import run_ranks

SILENCE_S = 10.0


def beat(count: int, *, lost: bool = False, pid: int = 7) -> Beat:
    return Beat("machine", "host", pid, count, lost)


def alive(beat: Beat) -> bool:
    return True


def test_silent_rank_is_accused_only_after_the_limit() -> None:
    signs = Signs([1, 2], 10.0, now=100.0)
    assert signs.judge({1: beat(1), 2: beat(1)}, 104.0, alive) is None
    assert signs.judge({1: beat(2), 2: beat(1)}, 113.9, alive) is None
    verdict = signs.judge({1: beat(3), 2: beat(1)}, 114.1, alive)
    assert verdict is not None
    assert verdict.accused == 2
    assert verdict.sentence.startswith("rank 2 (process 7 on host): gave no sign of life for 10 s; started again, the")


def test_rank_that_never_gave_a_sign_is_accused() -> None:
    signs = Signs([3], 10.0, now=0.0)
    assert signs.judge({}, 9.9, alive) is None
    assert signs.judge({}, 10.1, alive) == Verdict(
        "rank 3: gave no sign of life for 10 s; started again, the run goes on from its newest training state", 3
    )


def test_rank_whose_process_ended_is_accused_at_once() -> None:
    signs = Signs([1, 2], 10.0, now=0.0)
    verdict = signs.judge({1: beat(1, pid=5), 2: beat(1, pid=6)}, 0.1, lambda beat: beat.pid != 6)
    assert verdict is not None
    assert verdict.sentence.startswith("rank 2 (process 6 on host): its process ended;")


def test_rank_that_does_not_miss_the_others_while_they_miss_it_is_accused() -> None:
    signs = Signs([1, 2, 3], 10.0, now=0.0)
    lost = {1: beat(1, lost=True), 2: beat(1), 3: beat(1, lost=True)}
    assert signs.judge(lost, 1.0, alive) is None
    moving = {rank: Beat("machine", "host", 7, 2, sign.lost) for rank, sign in lost.items()}
    assert signs.judge(moving, 12.9, alive) is None
    verdict = signs.judge({rank: Beat("machine", "host", 7, 3, sign.lost) for rank, sign in lost.items()}, 13.1, alive)
    assert verdict is not None
    assert verdict.sentence.startswith("rank 2 (process 7 on host): hangs")


def test_ranks_that_all_miss_one_another_accuse_nobody() -> None:
    signs = Signs([1, 2], 10.0, now=0.0)
    for now in range(1, 40):
        assert signs.judge({rank: beat(now, lost=True) for rank in (1, 2)}, float(now), alive) is None


def test_every_rank_is_watched_and_all_of_a_machine_watch_one_another() -> None:
    machines, each = random.randint(1, 4), random.randint(2, 5)
    world = machines * each
    watched = {rank: watched_ranks(rank, world, rank % each, each) for rank in range(world)}
    assert watched[0] == list(range(1, world))
    assert 0 in watched[1]
    for rank, others in watched.items():
        mates = set(range(rank // each * each, (rank // each + 1) * each)) - {rank}
        assert mates <= set(others)
        assert rank not in others
        assert any(rank in seen for seen in watched.values())


def test_ended_process_is_seen_before_its_parent_has_looked() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT) is None:
        pass
    assert not exists(pid)
    os.waitpid(pid, 0)
    assert not exists(pid)
    assert exists(os.getpid())


def test_first_fault_that_is_told_is_the_verdict() -> None:
    store = dist.HashStore()
    watches = [Watch(store, rank, [1 - rank], SILENCE_S) for rank in range(2)]
    assert watches[1].tell("rank 1: the disk is full")
    assert not watches[0].tell("rank 0: also")
    assert watches[0].miss() == Verdict("rank 1: the disk is full")


# On ranks: each returns how it ended, and what was written to stderr.


def _disturbed(what: str, folder: str) -> tuple[str, str]:
    """Sum over three ranks until the last of them meets its fate; returns how this one ended, and what it said."""
    said = Path(folder, os.environ["RANK"])
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    timeout_s = 2.0 if what == "hangs" else 300.0
    try:
        with join(silence_s=SILENCE_S, timeout_s=timeout_s) as ranks:
            dist.all_reduce(torch.ones(1))
            if ranks.rank == 2:
                _meet_fate(what)
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
    elif what == "hangs":
        time.sleep(1e6)
    elif what == "meets a defect":
        raise ValueError("a defect")
    elif what == "meets a fault":
        raise DataError("shard 3 is damaged")
    elif what == "is late":
        time.sleep(2 * SILENCE_S / BEATS)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [("dies", "its process ended"), ("stops", "gave no sign of life for 10 s"), ("hangs", "hangs: it lives, but")],
)
def test_lost_rank_is_named_once_and_all_others_end(tmp_path: Path, what: str, sentence: str) -> None:
    ended = run_ranks(3, _disturbed, what, str(tmp_path), dying=(2,))
    assert [end for end, _ in ended[:2]] == [f"SystemExit: {RankError.exit_code}"] * 2
    assert ended[2] is None
    (told,) = [
        line for number in range(3) for line in (tmp_path / str(number)).read_text().splitlines() if line[:5] == "error"
    ]
    assert told.startswith("error: rank 2 (process ")
    assert f"): {sentence}" in told


@pytest.mark.parametrize(
    ("what", "error"), [("meets a defect", "ValueError: a defect"), ("meets a fault", "DataError: shard 3 is damaged")]
)
def test_rank_that_tells_its_own_fault_is_not_accused(tmp_path: Path, what: str, error: str) -> None:
    ended = run_ranks(3, _disturbed, what, str(tmp_path))
    assert ended[2][0] == error
    assert [end for end, _ in ended[:2]] == ["SystemExit: 1"] * 2
    assert not any("error: rank" in said for _, said in ended)


def test_rank_that_is_late_is_waited_for(tmp_path: Path) -> None:
    assert [end for end, _ in run_ranks(3, _disturbed, "is late", str(tmp_path))] == ["done"] * 3
