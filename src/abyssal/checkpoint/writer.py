"""Training states written while the run goes on."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from abyssal.checkpoint.state import save_state


class StateWriter:
    """Writes one training state at a time in a thread of its own, from a copy taken when it was asked for.

    A write that failed is told at the next call, whichever it is; the states before it are untouched. Leaving the
    context waits for the write that is under way.
    """

    def __init__(self, root: Path, *, keep: int, keep_multiples_of: int = 0) -> None:
        """Write under `root`; for the others see `save_state`."""
        self.root, self.keep, self.keep_multiples_of = root, keep, keep_multiples_of
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

    def save(self, step: int, tensors: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        """Copy the tensors and begin to write them; a write under way is waited for first.

        Raises:
            CheckpointError: an earlier write failed.
        """
        self.wait()
        copy = _copy(tensors)
        self._thread = threading.Thread(target=self._write, args=(step, copy, dict(progress)), name="state-writer")
        self._thread.start()

    def has(self, step: int) -> bool:
        """Whether the state of that step is on the disk, after waiting for the write under way.

        Raises:
            CheckpointError: the disk refused.
        """
        self.wait()
        return (self.root / f"step-{step:08d}").exists()

    def check(self) -> None:
        """Raise what a finished write met, without waiting for one that is under way.

        Raises:
            CheckpointError: the disk refused.
        """
        if self._thread is None or not self._thread.is_alive():
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

    def _write(self, step: int, tensors: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        try:
            save_state(self.root, step, tensors, progress, keep=self.keep, keep_multiples_of=self.keep_multiples_of)
        except BaseException as error:  # raised again in the main thread, whatever it is
            self._error = error


def _copy(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts with a copy of every tensor, on the CPU and out of the way of the next step."""
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else _copy(value)
        for name, value in tensors.items()
    }
