"""Progress in bytes on stderr: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from abyssal.report.numbers import byte_size

#: Between two lines where there is no terminal.
INTERVAL_S = 30.0


class ByteProgress:
    """Shows how many of a number of bytes are done; shows nothing of what takes less than a moment."""

    def __init__(self, what: str, console: Console | None = None) -> None:
        """Name what is done: `converting`."""
        self._what, self._console = what, console or Console(stderr=True, highlight=False)
        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task(what, total=None)
        self._begin = self._last = time.monotonic()

    def __enter__(self) -> Self:
        """Begin to show."""
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Clear the bar."""
        if self._console.is_terminal:  # elsewhere rich would leave an empty line
            self._bar.stop()

    def show(self, done: int, total: int, before: int = 0) -> None:
        """Show `done` of `total` bytes; `before` of them were done earlier and say nothing of the rate."""
        if self._console.is_terminal:
            if self._bar.tasks[0].total is None:
                self._bar.reset(self._task, total=total, completed=before)
            self._bar.update(self._task, total=total, completed=done)
        elif (now := time.monotonic()) - self._last >= INTERVAL_S:
            self._last = now
            rate = max(done - before, 1) / (now - self._begin)
            self._console.print(
                f"{self._what}: {byte_size(done)} of {byte_size(total)}, {byte_size(rate)}/s, "
                f"{(total - done) / rate / 60:.0f} min left",
                markup=False,
            )
