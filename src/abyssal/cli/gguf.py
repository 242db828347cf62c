"""`abyssal convert --to gguf`: one file for llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer


def convert_to_gguf(source: Path, target: Path, dtype: str, others: Mapping[str, bool]) -> None:
    """Write the GGUF file, with progress, and say in what it is less than the model directory.

    `others` are options of the other formats, and whether they were given.

    Raises:
        UsageError: one was.
    """
    import time

    from abyssal.checkpoint.gguf.write import write_gguf
    from abyssal.cli.byte_progress import ByteProgress
    from abyssal.errors import UsageError
    from abyssal.report.numbers import byte_size

    if given := [option for option, is_given in others.items() if is_given]:
        raise UsageError(f"{', '.join(given)}: is not for --to gguf; leave it out")
    begin = time.monotonic()
    with ByteProgress("converting") as progress:
        remarks = write_gguf(source, target, dtype=dtype, on_progress=progress.show)
    size = byte_size(target.stat().st_size)
    typer.echo(f"{target}: {size}, matrices in {dtype}; {time.monotonic() - begin:.1f} s")
    for remark in remarks:
        typer.echo(f"note: {remark}")
