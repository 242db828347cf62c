"""What was written reaches the disk."""

from __future__ import annotations

import os
from pathlib import Path


def flush_tree(root: Path) -> None:
    """Flush every file and folder under `root` to the disk, the folders after what they hold."""
    for folder, _, files in os.walk(root, topdown=False):
        for file in files:
            flush(Path(folder, file))
        flush(Path(folder))


def flush(path: Path) -> None:
    """Flush one file, or the names in one folder, to the disk: until then, a power cut can undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
