"""From tokens that come one by one to text that ends where it should."""

from __future__ import annotations

from collections.abc import Sequence

from abyssal.engine.stop_strings import StopStringFilter
from abyssal.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of ids that come one by one: whole characters only, and nothing from the first stop string on."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Start an empty text that ends before any string in `stop`."""
        self._decoder = tokenizer.stream()
        self._filter = StopStringFilter(stop)

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, if one has."""
        return self._filter.matched

    def push(self, token: int) -> str:
        """Take the next id and return the text that is certain by now, perhaps none."""
        return self._filter.push(self._decoder.push(token))

    def flush(self) -> str:
        """Return what was held back, U+FFFD for an unfinished character, once no more ids will come."""
        return self._filter.push(self._decoder.flush()) + self._filter.flush()
