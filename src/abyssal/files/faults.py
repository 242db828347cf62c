"""Faults of the operating system as sentences."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from abyssal.errors import AbyssalError

GIB = 2**30
#: What to do about the faults of a disk, by errno.
ADVICE = {
    errno.ENOSPC: "free some space there, or choose another disk",
    errno.EDQUOT: "free some space within your quota, or choose another disk",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
    errno.EACCES: "check the owner and permissions of that folder",
    errno.EPERM: "check the owner and permissions of that folder",
    errno.EROFS: "choose a folder that can be written",
}


@contextmanager
def os_faults(fault: type[AbyssalError], path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError of the body into `fault`, with the sentence `path: cannot <doing> (<reason>); <advice>`."""
    try:
        yield
    except OSError as error:
        raise fault(f"{path}: cannot {doing} ({explain(error)})") from error


def explain(error: OSError) -> str:
    """Return the system's words for `error`, the file if it names one, and what to do if that is known."""
    file = f": {error.filename}" if error.filename is not None else ""
    advice = ADVICE.get(error.errno or 0)
    return f"{error.strerror or error}{file}" + (f"; {advice}" if advice else "")


def check_free_space(path: Path, needed_bytes: int, fault: type[AbyssalError]) -> None:
    """Raise `fault` before a write that cannot fit on the disk of `path`; it names free and needed bytes in GiB."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise fault(
            f"{path}: needs {needed_bytes / GIB:.2f} GiB, but {free / GIB:.2f} GiB are free on its disk; "
            f"{ADVICE[errno.ENOSPC]}"
        )
