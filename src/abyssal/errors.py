"""Every fault a user can cause, as one exception tree.

The command line prints the message of an `AbyssalError` as one sentence and exits with its `exit_code`;
anything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class AbyssalError(Exception):
    """A fault with a sentence for the user: what was wrong, what is allowed, what to do."""

    exit_code: ClassVar[int] = 1


class UsageError(AbyssalError):
    """The command was asked for something that cannot be: a wrong argument, field or combination."""

    exit_code: ClassVar[int] = 2


class ConfigError(UsageError):
    """A recipe or config.json has an unknown, missing or contradictory field."""


class DataError(AbyssalError):
    """A corpus, tokenizer or shard is missing, empty, undecodable or damaged."""


class CheckpointError(AbyssalError):
    """A training state is missing, damaged, does not fit the run, or could not be written."""


class DamagedStateError(CheckpointError):
    """A training state is not what was written: a file of it is missing, or another than its checksum says."""


class ModelDirectoryError(AbyssalError):
    """A model directory lacks a file, or a file in it is damaged or does not fit its config."""


class TrainingError(AbyssalError):
    """The run cannot go on: the loss or a gradient is not finite, or far above those of the steps before."""


class RankError(AbyssalError):
    """A rank of the run did not come, died or hangs; what its launcher starts again goes on."""


class Stopped(BaseException):
    """A signal ended the run after a step that was saved; like KeyboardInterrupt, it is no fault and no `Exception`."""

    def __init__(self, signal: int) -> None:
        """Keep the number of the signal; a shell reports 128 plus it."""
        super().__init__(signal)
        self.signal = signal


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `"; nearest: x"` for the allowed name most like `name`, or `""` when none is alike."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; nearest: {close[0]}" if close else ""


def nearest_numbers(value: int, allowed: Iterable[int]) -> str:
    """Return the allowed numbers next below and next above a value that is not among them; they ascend."""
    numbers = list(allowed)
    below, above = [n for n in numbers if n < value], [n for n in numbers if n > value]
    return ", ".join(map(str, (*below[-1:], *above[:1])))


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
