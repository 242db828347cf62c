"""Weights from safetensors files straight into their places in memory, for loading that waits on nothing else.

A mapped file costs a page fault for every few pages, and a copy through it runs at half the speed of the system's own
read into the destination. Each tensor is looked at for values that are not finite while the cache still holds it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from abyssal.checkpoint.hf.headers import DTYPES, Header, value_offsets
from abyssal.checkpoint.hf.mismatch import is_finite
from abyssal.errors import ModelDirectoryError
from abyssal.files.faults import os_faults

#: Bytes that one thread reads before another may take over.
CHUNK_BYTES = 2**22


def can_read_into(header: Header, place: torch.Tensor) -> bool:
    """Whether a stored tensor can be read into `place` as it is: same type, contiguous, on the CPU."""
    return place.device.type == "cpu" and place.is_contiguous() and DTYPES.get(header.dtype) == place.dtype


def read_into(places: Mapping[str, torch.Tensor], headers: Mapping[str, Header], threads: int) -> list[str]:
    """Fill each place with the stored tensor of its name; all are such that `can_read_into`.

    Returns:
        The names of those that hold a value that is not finite.

    Raises:
        ModelDirectoryError: a file cannot be read, or ends too early.
    """
    files = sorted({headers[name].file for name in places})
    with ExitStack() as stack, ThreadPoolExecutor(threads) as pool:
        offsets, descriptors = {}, {}
        for file in files:
            with os_faults(ModelDirectoryError, file, "read the weights"):
                opened = stack.enter_context(file.open("rb"))
                descriptors[file], offsets[file] = opened.fileno(), value_offsets(opened)

        def fill(name: str) -> str | None:
            file = headers[name].file
            return None if _fill(places[name], descriptors[file], offsets[file][name], file) else name

        ordered = sorted(places, key=lambda name: (headers[name].file, offsets[headers[name].file][name]))
        return [name for name in pool.map(fill, ordered) if name is not None]


def _fill(place: torch.Tensor, descriptor: int, offset: int, file: Path) -> bool:
    """Read one tensor, and return whether it is finite."""
    flat = place.detach().view(-1)
    target = memoryview(flat.view(torch.uint8).numpy().data)
    finite, step = True, CHUNK_BYTES
    for start in range(0, len(target), step):
        part = target[start : start + step]
        done = 0
        while done < len(part):
            with os_faults(ModelDirectoryError, file, "read the weights"):
                got = os.preadv(descriptor, [part[done:]], offset + start + done)
            if not got:
                raise ModelDirectoryError(f"{file}: ends too early; it was changed while it was read")
            done += got
        values = slice(start // place.itemsize, (start + len(part)) // place.itemsize)
        finite = is_finite(flat[values]) and finite
    return finite
