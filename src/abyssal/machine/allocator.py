"""How this process's allocator treats freed memory."""

from __future__ import annotations

import ctypes
import sys

# glibc's names and numbers, <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C allocator keep large freed blocks, instead of returning them to the system at once.

    A training step frees and allocates the same large tensors again and again; without this each allocation is a
    fresh mapping whose every page faults. Costs peak memory held until the process ends.

    Returns:
        Whether it took effect: only glibc has such a setting.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
