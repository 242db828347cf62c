"""Writing a file that an option asks for."""

from __future__ import annotations

from pathlib import Path


def write_output(option: str, path: Path, suffix: str, text: str) -> None:
    """Write `text` to the file of an option, whole or not at all.

    Raises:
        UsageError: the name does not end in `suffix`, so the file may be another one that should stay.
        AbyssalError: the disk refused.
    """
    from abyssal.errors import AbyssalError, UsageError
    from abyssal.files.atomic import write_text
    from abyssal.files.faults import os_faults

    if path.suffix != suffix:
        raise UsageError(f"{option} {path}: must end in {suffix}")
    with os_faults(AbyssalError, path, "write it"):
        write_text(path, text)
