"""Files of JSON objects, one a line, each with the step that it is about; steps never fall from line to line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from abyssal.files.atomic import atomic_file


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def cut_lines(path: Path, step: int) -> None:
    """Cut a file behind its last line about `step` or an earlier one; one that is not there stays away.

    It is read from its end, as far as it is cut. A line there that is cut short or damaged goes with the rest; what is
    damaged before stays, and whoever reads the file leaves it out.
    """
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        with mmap(file.fileno(), 0, access=ACCESS_READ) as text:
            stop = text.rfind(b"\n") + 1
            while stop:
                begin = text.rfind(b"\n", 0, stop - 1) + 1
                about = _step(text[begin:stop])
                if about is not None and about <= step:
                    break
                stop = begin
        file.truncate(stop)
        os.fsync(file.fileno())


def thin_lines(path: Path, keeps: Callable[[int], bool]) -> None:
    """Leave the lines about steps that `keeps` names, whole or not at all; damaged ones go."""
    with atomic_file(path) as staging, staging.open("wb") as thinned, path.open("rb") as file:
        for line in file:
            about = _step(line)
            if about is not None and keeps(about):
                thinned.write(line)


def _step(line: bytes) -> int | None:
    """Return the step that a line is about, none where it is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
