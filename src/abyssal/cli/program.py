"""How this program was called, so that the commands it proposes can be pasted into the same shell."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """Return what to type to call this program again: `abyssal` where the shell finds it, else the path to it."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m abyssal"
    on_path = shutil.which("abyssal")
    if called.stem != "abyssal" or not called.exists() or (on_path and Path(on_path).samefile(called)):
        return "abyssal"
    return shlex.quote(sys.argv[0])
