"""`abyssal doctor`: what this machine is, and what would run on it."""

from __future__ import annotations


def doctor() -> None:
    """Show this machine, and how a model would run on it: the compute dtype, and the version of each operation.

    For training and for decoding, with the reason for each faster version that is passed over.

    The dtype follows from a measurement of about a second.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from abyssal.machine.describe import describe_machine
    from abyssal.machine.matmul_speed import choose_compute_dtype, measure_matmul
    from abyssal.ops.kernels import choose_kernels, passed_over
    from abyssal.ops.version import PURPOSES

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
    for purpose in PURPOSES:
        table.add_section()
        reasons = passed_over(device, choice.dtype, purpose)
        for operation, chosen in choose_kernels(device, choice.dtype, purpose).describe().items():
            others = (f"  not {name}: {reason}" for name, reason in reasons[operation].items())
            table.add_row(f"{purpose}: {operation.replace('_', ' ')}", "\n".join((chosen, *others)))
    Console().print(table, highlight=False)
