"""Writing whole or not at all: aside, flushed to the disk, then renamed.

Names beside a target `x`, all starting with a dot: `.x.writing-*` is being written (or was, when its run was killed),
`.x.replaced-*` is what `x` was before a replacement.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from abyssal.errors import AbyssalError, CheckpointError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: no locks, so nothing there is taken for left behind
    fcntl = None  # type: ignore[assignment]

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


def free_space_check(path: Path, needed_bytes: int) -> None:
    """Refuse to begin a write that cannot fit on the disk of `path`.

    Raises:
        CheckpointError: fewer than `needed_bytes` are free; names both in GiB.
    """
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{path}: needs {needed_bytes / GIB:.2f} GiB, but {free / GIB:.2f} GiB are free on its disk; "
            f"{ADVICE[errno.ENOSPC]}"
        )


@contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a staging folder beside `target` that becomes `target` when the body ends, whole or not at all.

    On success every file and folder in it is flushed to the disk before the rename. On any exception, Ctrl-C and
    DCP's `CheckpointException` (a BaseException) included, the staging folder is removed and `target` stays as it was.
    With `replace`, a folder that stands at `target` is moved aside for the rename and removed after it.

    Raises:
        FileExistsError: something stands at `target`, and `replace` was not given.
        OSError: the disk refused.
    """
    target = target.resolve()
    if not replace and os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target.parent, target.name)
    staging = _beside(target, "writing")
    staging.mkdir()
    try:
        with locked(staging, needed=False):
            yield staging
            flush_tree(staging)
            _put(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    flush(target.parent)


def remove_stale(folder: Path, name: str | None = None) -> None:
    """Clear what killed runs left in `folder` while writing `name`, or any target without a name.

    A staging folder is left behind when nobody holds its lock; where the file system has no locks, it stays. A folder
    moved aside by a replacement that was cut short goes back to its place, or is removed where its successor stands.
    """
    for left in folder.glob(".*.writing-*"):
        if _belongs(left, name) and left.is_dir() and not left.is_symlink():
            with suppress(OSError), locked(left):
                shutil.rmtree(left, ignore_errors=True)
    for left in folder.glob(".*.replaced-*"):
        if _belongs(left, name):
            original = folder / left.name[1:].rpartition(".replaced-")[0]
            if original.exists():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(original)


def remove_directory(path: Path) -> None:
    """Remove a folder so that it is never seen in part: renamed away first, then deleted."""
    aside = _beside(path.absolute(), "writing")
    path.rename(aside)
    shutil.rmtree(aside)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`; the file written there becomes `target`, flushed to the disk, when the body ends.

    On any exception it is removed, and an older `target` stays as it was.

    Raises:
        OSError: the disk refused.
    """
    staging = target.with_name(f".{target.name}.writing")  # one name, so that a killed run leaves at most one such file
    try:
        yield staging
        flush(staging)
        staging.replace(target)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    flush(target.absolute().parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all, in place of an older one.

    Raises:
        OSError: the disk refused; an older file is as it was.
    """
    with atomic_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def flush_tree(root: Path) -> None:
    """Flush every file and folder under `root` to the disk, the folders after what they hold."""
    for folder, _, files in os.walk(root, topdown=False):
        for file in files:
            flush(Path(folder, file))
        flush(Path(folder))


def flush(path: Path) -> None:
    """Flush one file, or the names in one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(target: Path, purpose: str) -> Path:
    """Return an unused hidden name in the folder of `target`."""
    return target.with_name(f".{target.name}.{purpose}-{secrets.token_hex(4)}")


def _belongs(left: Path, name: str | None) -> bool:
    """Whether a hidden name was made by `_beside` for the target `name`."""
    return name is None or left.name[1:].rpartition(".")[0] == name


@contextmanager
def locked(folder: Path, *, needed: bool = True) -> Iterator[None]:
    """Hold the exclusive lock of a folder, which the system drops when the process ends, however it ends.

    Raises:
        OSError: another process holds it, or, where the lock is `needed`, the file system has no locks on folders.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            if fcntl is None:  # pragma: no cover
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), str(folder))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            if needed:
                raise
        yield
    finally:
        os.close(descriptor)


def _put(staging: Path, target: Path) -> None:
    """Rename the finished staging folder to `target`, and remove what stood there."""
    aside = None
    if target.exists():
        aside = _beside(target, "replaced")
        target.rename(aside)
    try:
        staging.rename(target)
    except BaseException:
        if aside is not None:
            aside.rename(target)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
