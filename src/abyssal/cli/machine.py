"""`abyssal machine`: this machine as a chip of the plan, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def machine(
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write it to a .toml file instead of printing it.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="What the chip is called in --cluster.")] = "machine",
) -> None:
    """Measure this machine, and print it as a chip that a plan can be made for.

    Products of several depths, passes over memory, and the size of memory; a few seconds. It is what
    `abyssal plan RECIPE --hardware machine.toml --cluster machine:1` takes. Examples:

        abyssal machine
        abyssal machine --out machine.toml
    """
    import re

    import torch

    from abyssal.cli.output_file import write_output
    from abyssal.errors import UsageError
    from abyssal.machine.describe import available_cores
    from abyssal.machine.limits import measure_limits

    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UsageError(f"--name {name}: must be letters, digits, - and _")
    torch.set_num_threads(available_cores())  # as training does
    text = measure_limits("cuda" if torch.cuda.is_available() else "cpu").toml(name)
    if out is None:
        typer.echo(text, nl=False)
        return
    write_output("--out", out, ".toml", text)
    typer.echo(f"written: {out}; try: abyssal plan demo --hardware {out} --cluster {name}:1")
