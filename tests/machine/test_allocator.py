"""The allocator's setting, in a process of its own, since it cannot be taken back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

LARGE_BLOCK = """
import torch
from abyssal.machine.allocator import keep_freed_memory
took = {setting}
first = torch.empty(64 << 20, dtype=torch.uint8)
place = first.data_ptr()
print(took, "heap" if "[heap]" in next(
    line for line in open("/proc/self/maps")
    if int(line.split("-")[0], 16) <= place < int(line.split("-")[1].split()[0], 16)
) else "mapping")
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")
@pytest.mark.parametrize(("setting", "expected"), [("keep_freed_memory()", "True heap"), ("None", "None mapping")])
def test_large_blocks_come_from_the_heap_that_is_kept(setting: str, expected: str) -> None:
    command = [sys.executable, "-c", LARGE_BLOCK.format(setting=setting)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == expected
