"""Files and folders that are written whole or not at all: aside, flushed to the disk, then renamed.

Names beside a target `x`, all starting with a dot: `.x.writing-*` is being written (or was, when its process was
killed), `.x.replaced-*` is the folder that `x` was before a replacement.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from abyssal.files.flush import flush, flush_tree
from abyssal.files.locks import locked


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield an empty file beside `target` that takes its place, flushed to the disk, when the body ends.

    On any exception it is removed, and an older `target` stays as it was.

    Raises:
        OSError: the disk refused.
    """
    with _staging(target, Path.touch) as staging:
        yield staging
        flush(staging)
        staging.replace(target)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, in place of an older one.

    Raises:
        OSError: the disk refused; an older file is as it was.
    """
    with atomic_file(path) as staging:
        staging.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all, in place of an older one.

    Raises:
        OSError: the disk refused; an older file is as it was.
    """
    write_bytes(path, text.encode())


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
    with _staging(target, Path.mkdir) as staging:
        yield staging
        flush_tree(staging)
        _put_in_place(staging, target)


def remove_directory(path: Path) -> None:
    """Remove a folder so that it is never seen in part: renamed away first, then deleted.

    Raises:
        OSError: the disk refused.
    """
    aside = _beside(path.absolute(), "writing")
    path.rename(aside)
    shutil.rmtree(aside)


def remove_stale(folder: Path, name: str | None = None) -> None:
    """Clear what killed processes left in `folder` while writing `name`, or any target without a name.

    What is being written holds its lock, so what nobody holds was left behind; where the file system has no locks, it
    stays. A folder moved aside by a replacement that was cut short goes back to its place, or is removed where its
    successor stands.
    """
    target = "*" if name is None else escape(name)
    for left in folder.glob(f".{target}.writing-*"):
        if not left.is_symlink():
            with suppress(OSError), locked(left, needed=True):
                _discard(left)
    for left in folder.glob(f".{target}.replaced-*"):
        original = folder / left.name[1:].rpartition(".replaced-")[0]
        if original.exists():
            _discard(left)
        else:
            left.rename(original)


@contextmanager
def _staging(target: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a new file or folder beside `target`, locked; the body renames it, and it is removed where that fails."""
    remove_stale(target.parent, target.name)
    staging = _beside(target, "writing")
    create(staging)
    try:
        with locked(staging):
            yield staging
    except BaseException:
        _discard(staging)
        raise
    flush(target.absolute().parent)


def _put_in_place(staging: Path, target: Path) -> None:
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
        _discard(aside)


def _beside(target: Path, purpose: str) -> Path:
    """Return an unused hidden name in the folder of `target`."""
    return target.with_name(f".{target.name}.{purpose}-{secrets.token_hex(4)}")


def _discard(path: Path) -> None:
    """Remove a file or folder as far as that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
