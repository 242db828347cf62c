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
from abyssal.checkpoint.convert.output_file import write_output_file
from abyssal.checkpoint.convert.plan import OutputFile
from abyssal.errors import ModelDirectoryError

#: How often the bytes written are told while no file ends.
INTERVAL_S = 0.2


def write_output_files(
    folder: Path, files: Sequence[OutputFile], workers: int, on_progress: Callable[[int], None]
) -> Generator[tuple[OutputFile, FileRecord]]:
    """Write the files with `workers` processes and yield each when it is whole, in any order.

    Leaving the iterator ends the processes; what they had not finished is removed. `on_progress` is called now and then
    with the bytes written in all.

    Raises:
        ModelDirectoryError: the disk refused, a tensor is not finite, or a process was killed.
    """
    if workers == 1 or len(files) <= 1:
        yield from _write_here(folder, files, on_progress)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in mid-air
    written, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(
        min(workers, len(files)), mp_context=context, initializer=_start, initargs=(_Shared(written, stop),)
    )
    try:
        tasks = {pool.submit(_write, folder, file): file for file in files}
        waiting = set(tasks)
        while waiting:
            done, waiting = wait(waiting, INTERVAL_S, FIRST_COMPLETED)
            on_progress(written.value)
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
    folder: Path, files: Sequence[OutputFile], on_progress: Callable[[int], None]
) -> Generator[tuple[OutputFile, FileRecord]]:
    written = 0

    def count(new_bytes: int) -> None:
        nonlocal written
        written += new_bytes
        on_progress(written)

    for file in files:
        yield file, write_output_file(folder, file, count)


@dataclass(frozen=True)
class _Shared:
    """What the processes have in common."""

    written: Synchronized[int]
    stop: Event

    def count(self, new_bytes: int) -> None:
        """Count bytes; end the work where it is not wanted any more."""
        with self.written.get_lock():
            self.written.value += new_bytes
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


def _write(folder: Path, file: OutputFile) -> FileRecord:
    return write_output_file(folder, file, _shared[0].count)
