"""Ctrl-C and SIGTERM: the first ends a run after its step, the second ends the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from abyssal.errors import Stopped

HANDLED = (signal.SIGINT, signal.SIGTERM)
FIRST = b"\nstopping: this step is finished and saved first; once more ends at once, without saving\n"


class StopSignals:
    """While entered, the first signal is only noted; the second ends the process with 128 plus its number.

    Signals reach the main thread only; entered in another one, this does nothing.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        """Nothing is asked for yet; of many processes that a signal reaches, one speaks."""
        self.requested: int | None = None  # the signal that this process was sent
        self.agreed: int | None = None  # what all ranks go by
        self._speaks = speaks
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in HANDLED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self, most: Callable[[int], int]) -> int | None:
        """Return the signal that any rank was sent, once all of them ask; `most` is the largest of their values.

        One that comes meanwhile is kept for the next time.
        """
        self.agreed = most(self.requested or 0) or None
        return self.agreed

    def stop(self) -> None:
        """End the run if a signal was agreed on.

        Raises:
            Stopped: it was.
        """
        if self.agreed is not None:
            raise Stopped(self.agreed)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            os._exit(128 + number)  # threads that still write are not waited for; what they leave is found next time
        self.requested = number
        if self._speaks:
            os.write(2, FIRST)  # not print: the signal may have come in the middle of one
