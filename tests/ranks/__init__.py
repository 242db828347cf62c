"""Run a function on several gloo ranks of this machine.

Each rank is a new process, so that no test sees what another left, forked from one that has imported what ranks need
already: that takes a hundredth of a second, where imports would take two seconds of each rank.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch._dynamo",  # which fully_shard imports
        "abyssal.cli.main",
        "abyssal.cli.train",
        "abyssal.train.dry_run",
        "abyssal.train.loop",
        "hypothesis",
        "pytest",
    ]
)


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_s: float = 300.0,
    dying: Collection[int] = (),
) -> list[Any]:
    """Return what `function(*arguments)` returns on each rank of a gloo group of `world_size` ranks, in their order.

    `function` is a module's own; torchrun's variables are set (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT), and no process group exists yet when it is called. Ranks in `dying` are killed by
    what they run; they return none.

    Raises:
        AssertionError: a rank raised or died; holds its traceback.
    """
    place = socket.socket()  # bound until all have answered, so that nobody else is given the port; rank 0 may share it
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.bind(("127.0.0.1", 0))
    port = place.getsockname()[1]
    processes, pipes = [], []
    for rank in range(world_size):
        here, there = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_run, args=(there, rank, world_size, port, function, arguments))
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    results, faults = [], []
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout_s):
                faults.append(f"rank {rank}: nothing after {timeout_s:.0f} s")
                break
            try:
                fine, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                fine, value = (True, None) if rank in dying else (False, "died")
            if not fine:
                faults.append(f"rank {rank}: {value}")
                break
            results.append(value)
    finally:
        place.close()
        for process in processes:
            process.join(0 if faults else 30)
            if process.is_alive():
                process.kill()
    assert not faults, faults[0]
    return results


def _run(
    pipe: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    try:
        pipe.send_bytes(pickle.dumps((True, function(*arguments))))  # not `send`, which shares memory
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
