"""The answers to a batch: a JSONL file that an interrupted run leaves whole up to its last line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from abyssal.engine.batch_input import BatchLine
from abyssal.errors import DataError, UsageError
from abyssal.files.atomic import atomic_file
from abyssal.files.faults import os_faults
from abyssal.files.locks import lock

#: Of every record; what ends without a line's end and does not begin so is somebody else's text.
BEGINNING = b'{"line": '


class BatchOutput:
    """The file, held under a lock; opening it finds what an earlier run has answered.

    While a batch runs the answers stand in the order in which they were ready; `sort` puts them into that of the input.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file, and cut off a last line that was not written to its end.

        Raises:
            DataError: it cannot be written, or another run writes it.
            UsageError: it holds something else.
        """
        self.path = path
        self.keys: dict[int, str] = {}  #: of the answers that are there, by number of line
        self.errors: dict[int, str] = {}  #: sentences of those that are errors
        self._places: dict[int, tuple[int, int]] = {}  # offset and length
        with os_faults(DataError, path, "write it"):
            self._file: BinaryIO = path.open("r+b" if path.exists() else "x+b")
        try:
            lock(self._file.fileno())
            self._read()
        except BlockingIOError:
            self._file.close()
            raise DataError(f"{path}: another run writes to it; wait for its end, or choose another --output") from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        """Return this file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file; what was written stays."""
        self._file.close()

    def check(self, lines: list[BatchLine]) -> None:
        """Refuse to go on where an answer belongs to another request.

        Raises:
            UsageError: it does; names its line.
        """
        asked = {line.number: line.key for line in lines}
        for number, key in self.keys.items():
            if asked.get(number) != key:
                raise UsageError(
                    f"{self.path}: has an answer to line {number} that was asked otherwise: the line, an option or the "
                    "model has changed; choose another --output, or remove the file"
                )

    def write(self, line: BatchLine, answer: Mapping[str, Any]) -> None:
        """Add the answer to a line, so that it outlives this process.

        Raises:
            DataError: the disk refused.
        """
        record = {"line": line.number, **line.label, **answer, "key": line.key}
        data = json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
        with os_faults(DataError, self.path, "write it"):
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(data)
            self._file.flush()
        self._note(record, offset, len(data))

    def sort(self) -> None:
        """Put the answers into the order of the input, whole or not at all.

        Raises:
            DataError: the disk refused.
        """
        places = [self._places[number] for number in sorted(self._places)]
        if places == sorted(places):
            return
        with (
            os_faults(DataError, self.path, "put it in order"),
            atomic_file(self.path) as staging,
            staging.open("wb") as file,
        ):
            for offset, length in places:
                self._file.seek(offset)
                file.write(self._file.read(length))

    def _read(self) -> None:
        """Find the answers that are there."""
        offset = 0
        for data in self._file:
            if not data.endswith(b"\n") and (data.startswith(BEGINNING) or BEGINNING.startswith(data)):
                self._file.truncate(offset)
                return
            try:
                record = json.loads(data)
                known = isinstance(record["line"], int) and isinstance(record["key"], str)
            except (ValueError, TypeError, KeyError):
                known = False
            if not known or record["line"] in self.keys:
                raise UsageError(f"{self.path}: is not the output of a batch; choose another --output")
            self._note(record, offset, len(data))
            offset += len(data)

    def _note(self, record: Mapping[str, Any], offset: int, length: int) -> None:
        number = record["line"]
        self.keys[number], self._places[number] = record["key"], (offset, length)
        if "error" in record:
            self.errors[number] = str(record["error"])
