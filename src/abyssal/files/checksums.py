"""SHA-256 of files, from the disk or while they are written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 2**22


def sha256(path: Path, on_read: Callable[[int], object] = lambda count: None) -> str:
    """Return the hexadecimal sha256 of a file; `on_read` is called with the bytes read since the last call.

    Raises:
        OSError: the disk refused.
    """
    digest, chunk = hashlib.sha256(), bytearray(CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(memoryview(chunk)[:count])
            on_read(count)
    return digest.hexdigest()


class HashingWriter:
    """Writes to an open file, and counts and hashes what it writes."""

    def __init__(self, file: BinaryIO | RawIOBase) -> None:
        """Count and hash from here on."""
        self.nbytes = 0
        self._file, self._digest = file, hashlib.sha256()

    @property
    def sha256(self) -> str:
        """The hexadecimal sha256 of everything written."""
        return self._digest.hexdigest()

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`, and return its length.

        Raises:
            OSError: the disk refused.
        """
        self._digest.update(data)
        self.nbytes += len(data)
        left = memoryview(data)
        while left:  # an unbuffered file may take a part only
            left = left[self._file.write(left) :]
        return len(data)
