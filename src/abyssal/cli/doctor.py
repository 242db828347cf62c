"""`abyssal doctor`: what this machine is, and what would run on it."""

from __future__ import annotations


def doctor() -> None:
    """Show this machine, its measured speed, and the versions of the operations that a model would run."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from abyssal.machine.describe import describe_machine
    from abyssal.machine.probe import choose_compute_dtype, measure
    from abyssal.ops.kernels import FAST

    speed = measure(device="cuda" if torch.cuda.is_available() else "cpu")
    table = Table(show_header=False, box=None)
    for name, value in describe_machine().rows():
        table.add_row(name, value)
    table.add_row("speed", speed.sentence())
    table.add_row("choice", choose_compute_dtype(speed).reason)
    for operation, version in FAST.describe().items():
        table.add_row(operation.replace("_", " "), version)
    Console().print(table, highlight=False)
