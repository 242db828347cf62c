"""Ends a stream of text before the first stop string, wherever the stream is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringFilter:
    """Passes text on, except for what might yet turn out to begin a stop string.

    The stop string that is complete first ends the text; of two that are complete at the same character, the longer.
    So what comes out depends on the text alone, not on how it was cut.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Watch for the strings in `stop`, none of them empty."""
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None  #: the stop string that ended the text

    def push(self, text: str) -> str:
        """Take the next piece and return what can be given out; after a match, nothing any more."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        border = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[border:]
        return text[:border]

    def flush(self) -> str:
        """Return what was held back, once no more text will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop` but is not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
