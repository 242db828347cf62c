"""Ranks find each other, however often they were started before, and leave together."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from abyssal.errors import RankError, UsageError
from abyssal.ranks.join import join, rendezvous
from abyssal.ranks.launch import Launch, read_launch
from ranks import run_ranks

pytestmark = pytest.mark.slow

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29511",
    "TORCHELASTIC_RUN_ID": "job",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def test_launch_is_what_torchrun_says() -> None:
    assert read_launch(TORCHRUN) == Launch(5, 8, 1, 4, "node0", 29511, id="job", agent_store=True)


def test_process_started_without_a_launcher_is_alone() -> None:
    assert read_launch({"WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Launch()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK=one: must be a number"),
        ({"MASTER_PORT": None}, "MASTER_PORT=: must be a number, since RANK is set; start with torchrun, or"),
        ({"RANK": "8"}, "RANK=8: must be below WORLD_SIZE=8"),
    ],
)
def test_incomplete_environment_is_refused(changed: dict[str, str | None], sentence: str) -> None:
    environment = {name: value for name, value in {**TORCHRUN, **changed}.items() if value is not None}
    with pytest.raises(UsageError) as fault:
        read_launch(environment)
    assert sentence in str(fault.value)


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "job"}])
def test_one_process_makes_no_group(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with join() as ranks:
        assert not dist.is_initialized()
    assert (ranks.rank, ranks.world_size, ranks.launch.id) == (0, 1, "job" if environment else "")


def meeting(store: dist.Store, world_size: int) -> list[str]:
    """Let all ranks meet, in a random order of coming."""
    ranks = random.sample(range(world_size), world_size)
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: rendezvous(store, rank, world_size, 60.0), ranks))


def test_each_attempt_meets_under_a_name_of_its_own() -> None:
    store, names = dist.HashStore(), []
    for world_size in (4, 4, 2, 5):  # as launchers come and go
        found = set(meeting(store, world_size))
        assert len(found) == 1
        names += found
    assert len(set(names)) == 4


@pytest.mark.parametrize("confirmed", [True, False])
def test_attempt_that_was_killed_while_it_met_is_no_obstacle(confirmed: bool) -> None:
    store = dist.HashStore()
    store.set("name", "earlier")
    for rank in (1, 3):
        store.set(f"earlier/{rank}", f"host {rank} {rank}")
    if confirmed:
        store.set("earlier/confirmed", "host 1 1\nhost 2 2\nhost 3 3")
    (name,) = set(meeting(store, 4))
    assert name != "earlier"


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr("secrets.token_hex", lambda size: "drawn")
    store.set("drawn/1", "host 1 1")
    with pytest.raises(RankError, match=r"^2 of 4 ranks did not come within 0 s: 2, 3$"):
        rendezvous(store, 0, 4, 0.01)
    with pytest.raises(RankError, match=r"^rank 2: was not confirmed by rank 0 within 0 s$"):
        rendezvous(store, 2, 4, 0.01)


def _sum_and_group() -> tuple[float, int, int]:
    with join() as ranks:
        value = torch.tensor([float(ranks.rank + 1)])
        dist.all_reduce(value)
        found = value.item(), ranks.rank, ranks.world_size
    assert not dist.is_initialized()
    return found


def test_ranks_join_one_group_and_leave_it() -> None:
    assert run_ranks(3, _sum_and_group) == [(6.0, rank, 3) for rank in range(3)]


def _refused(refusing: tuple[int, ...]) -> tuple[str, object]:
    try:
        with join() as ranks:
            dist.barrier()
            if ranks.rank in refusing:
                raise UsageError("3 ranks: must be a multiple of 2")
            return "finished", None
    except (UsageError, SystemExit) as fault:
        return type(fault).__name__, fault.exit_code if isinstance(fault, UsageError) else fault.code


def test_fault_that_many_ranks_meet_is_told_by_one() -> None:
    ended = run_ranks(3, _refused, (0, 1, 2))
    assert sorted(ended) == [("SystemExit", 2), ("SystemExit", 2), ("UsageError", 2)]
