"""DeepSeek's forms within a model's text: reasoning between `<think>` and `</think>`, and tool calls.

Text comes in pieces cut anywhere. Everything comes out again: what is neither reasoning, nor a call, nor a mark of
either, is content, and the raw texts of all pieces together are the text.

V3 and R1 write a call as
`<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME` + a fenced block of JSON + `<｜tool▁call▁end｜>`, V3.1 as
`<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>JSON<｜tool▁call▁end｜>`; all calls stand between `<｜tool▁calls▁begin｜>` and
`<｜tool▁calls▁end｜>`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

THINK, END_THINK = "<think>", "</think>"
CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FUNCTION, FENCE, END_FENCE = "function", "\n```json\n", "\n```"
LONGEST_NAME = 64

Kind = Literal["content", "reasoning", "call", "arguments", "mark"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the model's text: `text` is what it says, `raw` how the model wrote it.

    Of a `call` the text is the function's name, its arguments follow in pieces of their own; a `mark` says nothing.
    """

    kind: Kind
    text: str
    raw: str


class OutputParser:
    """Takes a text apart as it comes."""

    def __init__(self, *, in_reasoning: bool = False, with_tools: bool = False) -> None:
        """Begin a text; `in_reasoning` where the prompt has already opened it, `with_tools` where calls are read."""
        self._held = ""
        self._with_tools = with_tools
        self._is_fenced = False
        self._read: Callable[[bool], Piece | None] = self._reasoning if in_reasoning else self._beginning

    def push(self, text: str) -> list[Piece]:
        """Take more text and return what is certain by now."""
        self._held += text
        return self._pieces(final=False)

    def flush(self) -> list[Piece]:
        """Return the rest, once no more text will come."""
        return self._pieces(final=True)

    def _pieces(self, *, final: bool) -> list[Piece]:
        pieces = []
        while self._held:
            reader = self._read
            piece = reader(final)
            if piece is not None:
                pieces.append(piece)
            elif self._read == reader:  # waits for more
                break
        return pieces

    def _take(self, kind: Kind, length: int, text: str | None = None) -> Piece | None:
        """Take so many characters as a piece; no characters, no piece."""
        raw, self._held = self._held[:length], self._held[length:]
        if not raw:
            return None
        return Piece(kind, "" if kind == "mark" else raw if text is None else text, raw)

    # Each reader returns a piece, or changes the reader, or waits for more text

    def _beginning(self, final: bool) -> Piece | None:
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._read = self._reasoning
            return self._take("mark", len(self._held) - len(text) + len(THINK))
        if final or not THINK.startswith(text):
            self._read = self._content
        return None

    def _reasoning(self, final: bool) -> Piece | None:
        if self._held.startswith(END_THINK):
            self._read = self._content
            return self._take("mark", len(END_THINK))
        return self._take("reasoning", _before(self._held, END_THINK, final))

    def _content(self, final: bool) -> Piece | None:
        if not self._with_tools:
            return self._take("content", len(self._held))
        if self._held.startswith(CALLS):
            self._read = self._first_head
            return None
        return self._take("content", _before(self._held, CALLS, final))

    def _first_head(self, final: bool) -> Piece | None:
        return self._head(CALLS, final)

    def _next_head(self, final: bool) -> Piece | None:
        return self._head("", final)

    def _head(self, prefix: str, final: bool) -> Piece | None:
        """Read all before the arguments of a call; what turns out to be none is content."""
        found = _head_of(self._held[len(prefix) :])
        if found == "more" and not final:
            return None
        if isinstance(found, str):
            self._read = self._content
            return self._take("content", max(len(prefix), 1))
        length, name, self._is_fenced = found
        self._read = self._arguments
        return self._take("call", len(prefix) + length, name)

    def _arguments(self, final: bool) -> Piece | None:
        end = (END_FENCE if self._is_fenced else "") + END_CALL
        for mark in (end, END_CALL):
            if self._held.startswith(mark):
                self._read = self._between
                return self._take("mark", len(mark))
        if final and self._is_fenced and self._held == END_FENCE:
            return self._take("mark", len(END_FENCE))
        length = min(_before(self._held, END_CALL, final), _before(self._held, end, final))
        if final and self._is_fenced and length == len(self._held) and self._held.endswith(END_FENCE):
            length -= len(END_FENCE)
        return self._take("arguments", length)

    def _between(self, final: bool) -> Piece | None:
        """Read what stands behind a call: another one, the end of all, or text."""
        text = self._held.lstrip()
        space = len(self._held) - len(text)
        if text.startswith(END_CALLS):
            self._read = self._content
            return self._take("mark", space + len(END_CALLS))
        if text.startswith(CALL):
            self._read = self._next_head
        elif not text and final:
            return self._take("mark", space)
        elif final or not any(mark.startswith(text) for mark in (CALL, END_CALLS)):
            self._read = self._content
        return None


def _before(text: str, mark: str, final: bool) -> int:
    """Return how much of `text` stands before `mark`, or before what may become it."""
    found = text.find(mark)
    if found >= 0:
        return found
    if final:
        return len(text)
    longest = min(len(text), len(mark) - 1)
    return len(text) - next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)


def _head_of(text: str) -> tuple[int, str, bool] | Literal["more", "none"]:
    """Return the length of a call's head, the function's name, and whether the arguments are fenced.

    `more` where that is not certain yet, `none` where it is no head.
    """
    text, space = text.lstrip(), len(text) - len(text.lstrip())
    if not text.startswith(CALL):
        return "more" if CALL.startswith(text) else "none"
    first, is_whole = _name(text[len(CALL) :], SEPARATOR)
    if not is_whole:
        return "none" if first is None else "more"
    assert first is not None
    length = space + len(CALL) + len(first) + len(SEPARATOR)
    if first == FUNCTION:
        name, is_whole = _name(text[length - space :], FENCE)
        if is_whole and name is not None:
            return length + len(name) + len(FENCE), name, True
        if name is not None:
            return "more"
    return length, first, False


def _name(text: str, mark: str) -> tuple[str | None, bool]:
    """Return the name at the beginning of `text`, None where there cannot be one, and whether `mark` follows it."""
    name = re.match(r"[\w.-]*", text)
    assert name is not None
    rest = text[name.end() :]
    if rest.startswith(mark) and 0 < name.end() <= LONGEST_NAME:
        return name[0], True
    return (name[0] if mark.startswith(rest) and name.end() <= LONGEST_NAME and (name[0] or not rest) else None), False
