"""The files of the output, written by several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_end
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from abyssal.checkpoint.convert.manifest import FileRecord
from abyssal.checkpoint.convert.output_file import write_shard
from abyssal.checkpoint.convert.plan import Shard
from abyssal.errors import ModelDirectoryError

#: How often the bytes written are told while no file ends.
INTERVAL_S = 0.2


def write_shards(
    folder: Path, shards: Sequence[Shard], workers: int, watch: Callable[[int], None]
) -> Generator[tuple[Shard, FileRecord]]:
    """Write the files with `workers` processes and yield each when it is whole, in any order.

    Leaving the iterator ends the processes; what they had not finished is removed. `watch` is told now and then how
    many bytes were written in all.

    Raises:
        ModelDirectoryError: the disk refused, a tensor is not finite, or a process was killed.
    """
    if workers == 1 or len(shards) <= 1:
        yield from _write_here(folder, shards, watch)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in mid-air
    written, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(
        min(workers, len(shards)), mp_context=context, initializer=_start, initargs=(_Shared(written, stop),)
    )
    try:
        tasks = {pool.submit(_write, folder, shard): shard for shard in shards}
        waiting = set(tasks)
        while waiting:
            done, waiting = wait(waiting, INTERVAL_S, FIRST_COMPLETED)
            watch(written.value)
            for task in done:
                yield tasks[task], task.result()
    except BrokenProcessPool:
        raise ModelDirectoryError(
            f"workers={workers}: one of the processes was killed, perhaps for want of memory; try fewer"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _write_here(
    folder: Path, shards: Sequence[Shard], watch: Callable[[int], None]
) -> Generator[tuple[Shard, FileRecord]]:
    written = 0

    def tick(count: int) -> None:
        nonlocal written
        written += count
        watch(written)

    for shard in shards:
        yield shard, write_shard(folder, shard, tick)


@dataclass(frozen=True)
class _Shared:
    """What the processes have in common."""

    written: Synchronized[int]
    stop: Event

    def tick(self, count: int) -> None:
        """Count bytes; end the work where it is not wanted any more."""
        with self.written.get_lock():
            self.written.value += count
        if self.stop.is_set():
            raise ModelDirectoryError("stopped")  # nobody waits for this result


#: Set once in each worker process and never in this one: what is shared goes to a process when it starts, only.
_shared: list[_Shared] = []


def _start(shared: _Shared) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it too, and stops this one
    torch.set_num_threads(1)  # the processes fill the machine
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _shared.append(shared)


def _end_with_parent() -> None:
    """End this process when the one that started it has ended, also by kill -9."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_end([parent.sentinel])
    os._exit(1)


def _write(folder: Path, shard: Shard) -> FileRecord:
    return write_shard(folder, shard, _shared[0].tick)
