"""`abyssal doctor`: what this machine is, and what would run on it."""

from __future__ import annotations


def doctor() -> None:
    """Show this machine, and how a model would run on it: the compute dtype, and the version of each operation.

    The dtype follows from a measurement of about a second.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from abyssal.machine.describe import describe_machine
    from abyssal.machine.matmul_speed import choose_compute_dtype, measure_matmul
    from abyssal.ops.kernels import choose_kernels

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speed = measure_matmul(device=device.type)
    choice = choose_compute_dtype(speed)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, value in describe_machine().rows():
        table.add_row(name, value)
    table.add_section()
    table.add_row("compute dtype", choice.reason)
    for operation, version in choose_kernels(device, choice.dtype).describe().items():
        table.add_row(operation.replace("_", " "), version)
    Console().print(table, highlight=False)
