"""How a process becomes a rank of a run, and how it leaves: by torchrun's environment, or alone."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from abyssal.errors import RankError, Stopped, UsageError
from abyssal.ranks.heartbeat import Heartbeats
from abyssal.ranks.launch import Launch, read_launch

if TYPE_CHECKING:  # a launch that is wrong is told without waiting for torch
    from torch._C._distributed_c10d import Store

    from abyssal.ranks.ranks import Ranks

#: How long the ranks of a launch may be apart when they come, seconds: imports from a loaded file server take minutes.
RENDEZVOUS_S = 600.0
#: How long one collective may take, seconds: the last resort, where nothing else has ended a run that hangs.
COLLECTIVE_S = 600.0
#: How long a rank may give no heartbeat, seconds.
SILENCE_S = 30.0
_OFFER_S = 1.0  # between two looks at whether another rank 0 has come meanwhile


@contextmanager
def join(*, silence_s: float = SILENCE_S, timeout_s: float = COLLECTIVE_S) -> Iterator[Ranks]:
    """Be a rank of the launch that the environment speaks of, with torch's default process group made; else be alone.

    On CUDA collectives go over NCCL, those of tensors in main memory over gloo; without CUDA all over gloo. The groups
    are destroyed at the end. After an error they are not, since that waits for other ranks: the process must end
    instead (`abyssal.cli.main.run`). Of one fault that many ranks meet, one rank raises the sentence, the others
    SystemExit; so do all where a rank died or hangs, which is named on stderr (`abyssal.ranks.heartbeat_monitor`).

    Args:
        silence_s: a rank that gives no heartbeat for so long ends the run.
        timeout_s: of one collective.

    Raises:
        UsageError: the environment is incomplete, or has more ranks than devices.
        RankError: other ranks did not come.
    """
    launch = read_launch(os.environ)
    store = open_store(launch) if launch.world_size > 1 or (launch.agent_store and not launch.id) else None
    if store is not None and launch.agent_store and not launch.id:
        launch = replace(launch, id=store.compare_set("launch", "", secrets.token_hex(8)).decode())
    from abyssal.ranks.ranks import Ranks

    if launch.world_size == 1 or store is None:
        yield Ranks(launch=launch)
        return
    from torch._C._distributed_c10d import PrefixStore

    name = rendezvous(store, launch.rank, launch.world_size)
    heartbeats = Heartbeats(launch, PrefixStore(f"{name}/heartbeats", store), name, silence_s)
    try:
        _make_group(PrefixStore(f"{name}/group", store), launch, timeout_s)
        yield Ranks.of_world(launch, heartbeats)
        _leave_together(heartbeats)
    except Stopped:
        _leave_together(heartbeats)
        raise
    except KeyboardInterrupt:
        heartbeats.report(f"rank {launch.rank}: interrupted")
        raise
    except BaseException as error:
        if _is_explained(error, heartbeats):
            raise SystemExit(getattr(error, "exit_code", RankError.exit_code)) from None
        raise
    finally:
        heartbeats.close()
    import torch.distributed as dist

    dist.destroy_process_group()


def _make_group(store: Store, launch: Launch, timeout_s: float) -> None:
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        _take_device(launch, torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timedelta(seconds=timeout_s)
    )


def _leave_together(heartbeats: Heartbeats) -> None:
    """Wait until all ranks are done: the first to end would look dead to the others, and may hold the store."""
    import torch
    import torch.distributed as dist

    heartbeats.done()
    with suppress(RuntimeError):  # gone already
        dist.all_reduce(torch.zeros(1))  # of main memory, so over gloo


def _is_explained(error: BaseException, heartbeats: Heartbeats) -> bool:
    """Whether another rank's failure explains why this one ends; else that of this one is now the run's."""
    if not is_lost_contact(error):
        return not heartbeats.report(f"rank {heartbeats.rank}: {type(error).__name__}: {error}")
    return heartbeats.report_lost() is not None or not heartbeats.report(f"rank {heartbeats.rank}: {error}")


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error came from a collective that missed another rank, not from this one's own work."""
    from torch.distributed import DistError

    text = str(error)
    return isinstance(error, (DistError, RankError)) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)
    )


def _take_device(launch: Launch, devices: int) -> None:
    import torch

    if launch.local_rank >= devices:
        raise UsageError(
            f"{launch.local_world_size} ranks on this machine, but it has {devices} GPU(s); start as many ranks: "
            f"--nproc-per-node {devices}, or hide the GPUs: CUDA_VISIBLE_DEVICES="
        )
    torch.cuda.set_device(launch.local_rank)


def open_store(launch: Launch) -> Store:
    """Connect to the store through which the ranks of a launch find each other.

    Raises:
        RankError: nobody serves it.
    """
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore

    serves = launch.rank == 0 and not launch.agent_store
    try:
        return TCPStore(
            launch.host,
            launch.port,
            is_master=serves,
            timeout=timedelta(seconds=RENDEZVOUS_S),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        server = "the launcher" if launch.agent_store else "rank 0"
        raise RankError(
            f"rank {launch.rank}: cannot reach the store of {server} at {launch.host}:{launch.port}: "
            f"{str(error).splitlines()[0]}"
        ) from None


def rendezvous(store: Store, rank: int, world_size: int, timeout_s: float = RENDEZVOUS_S) -> str:
    """Return a name for this attempt, the same on all ranks, that no earlier attempt had.

    A store that outlives the ranks still holds the addresses of those that were killed, so each attempt needs keys of
    its own. The launcher's counts of restarts do not give them: several launchers count differently, and a change of
    their number is not counted. Rank 0 draws a name and, once every rank has answered to it, confirms with what they
    answered. A rank that meets the name of an earlier attempt finds no confirmation that holds its own answer there,
    and looks again.

    Raises:
        RankError: not all came in time.
    """
    import torch.distributed as dist

    deadline = time.monotonic() + timeout_s
    if rank == 0:
        name = secrets.token_hex(8)
        store.set("name", name)
        others = [f"{name}/{number}" for number in range(1, world_size)]
        try:
            store.wait(others, timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            missing = [number for number in range(1, world_size) if not store.check([f"{name}/{number}"])]
            shown = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
            raise RankError(
                f"{len(missing)} of {world_size} ranks did not come within {timeout_s:.0f} s: {shown}"
            ) from None
        store.set(f"{name}/confirmed", b"\n".join(store.multi_get(others)).decode())
        return name
    answer = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
    while (left := deadline - time.monotonic()) > 0:
        try:
            store.wait(["name"], timedelta(seconds=left))
            name = store.get("name").decode()
            store.set(f"{name}/{rank}", answer)
            store.wait([f"{name}/confirmed"], timedelta(seconds=_OFFER_S))
        except dist.DistStoreError:
            continue
        if answer in store.get(f"{name}/confirmed").decode().split("\n"):
            return name
        time.sleep(0.05)  # rank 0 of this attempt has not come yet
    raise RankError(f"rank {rank}: was not confirmed by rank 0 within {timeout_s:.0f} s")
