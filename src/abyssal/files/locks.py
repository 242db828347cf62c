"""Exclusive locks on files and folders, which the system drops when a process ends, however it ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: no locks, so nothing there is taken for left behind
    fcntl = None  # type: ignore[assignment]


def lock(descriptor: int, *, needed: bool = False) -> None:
    """Take the exclusive lock of an open file or folder until it is closed.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the lock is `needed`, and the file system has none.
    """
    try:
        if fcntl is None:  # pragma: no cover
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # pragma: no cover
        if needed:
            raise


@contextmanager
def locked(path: Path, *, needed: bool = False) -> Iterator[None]:
    """Hold the lock of a file or folder that exists.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the lock is `needed`, and the file system has none.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # over NFS only what can be written
    try:
        lock(descriptor, needed=needed)
        yield
    finally:
        os.close(descriptor)
