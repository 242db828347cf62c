"""Parses a model's text as it comes: reasoning between `<think>` and `</think>`, tool calls, and content.

The text may be cut anywhere. What is neither reasoning, nor a call, nor a tag of either, is content; the raw texts of
all segments together are the text.

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
MAX_NAME_LENGTH = 64

SegmentKind = Literal["content", "reasoning", "call", "arguments", "mark"]


@dataclass(frozen=True, slots=True)
class OutputSegment:
    """A part of the model's text of one kind: `text` is its content, `raw` how the model wrote it.

    The text of a `call` is the function's name; its arguments follow in segments of their own. A `mark` has no text.
    """

    kind: SegmentKind
    text: str
    raw: str


class OutputParser:
    """Parses a text as it comes."""

    def __init__(self, *, in_reasoning: bool = False, with_tools: bool = False) -> None:
        """Begin a text; `in_reasoning` where the prompt has already opened it, `with_tools` where calls are read."""
        self._buffer = ""
        self._with_tools = with_tools
        self._is_fenced = False
        self._read: Callable[[bool], OutputSegment | None] = self._reasoning if in_reasoning else self._beginning

    def push(self, text: str) -> list[OutputSegment]:
        """Add text and return the segments that are certain by now."""
        self._buffer += text
        return self._segments(final=False)

    def flush(self) -> list[OutputSegment]:
        """Return the rest, once no more text will come."""
        return self._segments(final=True)

    def _segments(self, *, final: bool) -> list[OutputSegment]:
        segments = []
        while self._buffer:
            reader = self._read
            segment = reader(final)
            if segment is not None:
                segments.append(segment)
            elif self._read == reader:  # waits for more
                break
        return segments

    def _take(self, kind: SegmentKind, length: int, text: str | None = None) -> OutputSegment | None:
        """Take so many characters as a segment, none where there are no characters."""
        raw, self._buffer = self._buffer[:length], self._buffer[length:]
        if not raw:
            return None
        return OutputSegment(kind, "" if kind == "mark" else raw if text is None else text, raw)

    # Each reader returns a segment, or changes the reader, or waits for more text

    def _beginning(self, final: bool) -> OutputSegment | None:
        text = self._buffer.lstrip()
        if text.startswith(THINK):
            self._read = self._reasoning
            return self._take("mark", len(self._buffer) - len(text) + len(THINK))
        if final or not THINK.startswith(text):
            self._read = self._content
        return None

    def _reasoning(self, final: bool) -> OutputSegment | None:
        if self._buffer.startswith(END_THINK):
            self._read = self._content
            return self._take("mark", len(END_THINK))
        return self._take("reasoning", _before(self._buffer, END_THINK, final))

    def _content(self, final: bool) -> OutputSegment | None:
        if not self._with_tools:
            return self._take("content", len(self._buffer))
        if self._buffer.startswith(CALLS):
            self._read = self._first_head
            return None
        return self._take("content", _before(self._buffer, CALLS, final))

    def _first_head(self, final: bool) -> OutputSegment | None:
        return self._head(CALLS, final)

    def _next_head(self, final: bool) -> OutputSegment | None:
        return self._head("", final)

    def _head(self, prefix: str, final: bool) -> OutputSegment | None:
        """Read the head of a call, up to its arguments; what turns out to be none is content."""
        head = _head_of(self._buffer[len(prefix) :])
        if head == "more" and not final:
            return None
        if isinstance(head, str):
            self._read = self._content
            return self._take("content", max(len(prefix), 1))
        length, name, self._is_fenced = head
        self._read = self._arguments
        return self._take("call", len(prefix) + length, name)

    def _arguments(self, final: bool) -> OutputSegment | None:
        end = (END_FENCE if self._is_fenced else "") + END_CALL
        for mark in (end, END_CALL):
            if self._buffer.startswith(mark):
                self._read = self._between
                return self._take("mark", len(mark))
        if final and self._is_fenced and self._buffer == END_FENCE:
            return self._take("mark", len(END_FENCE))
        length = min(_before(self._buffer, END_CALL, final), _before(self._buffer, end, final))
        if final and self._is_fenced and length == len(self._buffer) and self._buffer.endswith(END_FENCE):
            length -= len(END_FENCE)
        return self._take("arguments", length)

    def _between(self, final: bool) -> OutputSegment | None:
        """Read what follows a call: another one, the end of the calls, or text."""
        text = self._buffer.lstrip()
        space = len(self._buffer) - len(text)
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
    position = text.find(mark)
    if position >= 0:
        return position
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
    first, is_complete = _name(text[len(CALL) :], SEPARATOR)
    if not is_complete:
        return "none" if first is None else "more"
    assert first is not None
    length = space + len(CALL) + len(first) + len(SEPARATOR)
    if first == FUNCTION:
        name, is_complete = _name(text[length - space :], FENCE)
        if is_complete and name is not None:
            return length + len(name) + len(FENCE), name, True
        if name is not None:
            return "more"
    return length, first, False


def _name(text: str, mark: str) -> tuple[str | None, bool]:
    """Return the name at the beginning of `text`, None where there cannot be one, and whether `mark` follows it."""
    name = re.match(r"[\w.-]*", text)
    assert name is not None
    rest = text[name.end() :]
    if rest.startswith(mark) and 0 < name.end() <= MAX_NAME_LENGTH:
        return name[0], True
    return (
        name[0] if mark.startswith(rest) and name.end() <= MAX_NAME_LENGTH and (name[0] or not rest) else None
    ), False
