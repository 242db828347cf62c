"""Training states written while the run goes on."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from abyssal.checkpoint.state.folders import state_path
from abyssal.checkpoint.state.local_shards import LocalShard, local_shards
from abyssal.checkpoint.state.save import save_shards
from abyssal.ranks.ranks import Ranks


class StateWriter:
    """Writes one training state at a time in a thread of its own, from a copy taken when it was asked for.

    A write that failed is told at the next call, whichever it is; the states before it are untouched. Leaving the
    context waits for the write that is under way.

    With a group, every method, the first and the last included, is for all its ranks to call in the same order.
    A write fails on all of them or on none, so they learn of it at the same call and none goes on alone. The threads
    speak over a group of their own: what they say never meets what the training does meanwhile.
    """

    def __init__(
        self, root: Path, *, keep: int, keep_multiples_of: int = 0, group: dist.ProcessGroup | None = None
    ) -> None:
        """Write under `root`; for the others see `save_state`. `group` itself is used in the calling thread only."""
        self.root, self.keep, self.keep_multiples_of, self.group = root, keep, keep_multiples_of, group
        self._threads_group: dist.ProcessGroup | None = None
        if group is not None:
            ranks = dist.get_process_group_ranks(group)
            self._threads_group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        """Nothing is under way."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the write under way; its fault is added to the one that ends the run, if there is one."""
        try:
            self.wait()
        except Exception as fault:
            if error is None:
                raise
            error.add_note(f"and the last training state was not written: {fault}")
        finally:
            if self._threads_group is not None:
                dist.destroy_process_group(self._threads_group)

    def save(self, step: int, tensors: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        """Copy what this rank holds of the tensors and begin to write it; a write under way is waited for first.

        Raises:
            CheckpointError: an earlier write failed.
        """
        self.wait()
        copy = local_shards(tensors, copy=True)
        self._thread = threading.Thread(target=self._write, args=(step, copy, dict(progress)), name="state-writer")
        self._thread.start()

    def has(self, step: int) -> bool:
        """Whether the state of that step is on the disk, after waiting for the write under way.

        Raises:
            CheckpointError: the disk refused.
        """
        self.wait()
        return Ranks(self.group).first(lambda: state_path(self.root, step).exists())

    def check(self) -> None:
        """Raise what a finished write met, without waiting for one that is under way; finished is what all ranks have.

        With a group it costs a message to the first rank and one back, while a write is under way, nothing otherwise.

        Raises:
            CheckpointError: the disk refused.
        """
        thread = self._thread
        if thread is not None and Ranks(self.group).agree(lambda: not thread.is_alive(), all):
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way.

        Raises:
            CheckpointError: the disk refused.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, step: int, shards: Mapping[str, LocalShard], progress: Mapping[str, Any]) -> None:
        keep, multiples, group = self.keep, self.keep_multiples_of, self._threads_group
        try:
            save_shards(self.root, step, shards, progress, keep, keep_multiples_of=multiples, group=group)
        except BaseException as error:  # raised again in the main thread, whatever it is
            self._error = error
