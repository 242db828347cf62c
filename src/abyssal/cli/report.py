"""`abyssal report`: one page about one run, or about several beside one another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="The folder of a run, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The page to write.",
            show_default="report.html, in the run's folder; of several runs, here",
        ),
    ] = None,
) -> None:
    """Write a page about a run: curves, expert load, samples, recipe; several runs are laid over one another.

    The page is one HTML file that needs nothing else. A run that still goes on, or was interrupted, is shown as far
    as it came. Examples:

        abyssal report runs/demo
        abyssal report runs/demo runs/notes --out comparison.html
    """
    from abyssal.errors import AbyssalError, UsageError
    from abyssal.files.atomic import write_text
    from abyssal.files.faults import os_faults
    from abyssal.report.page import render_page
    from abyssal.report.run_record import read_runs

    page = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if page.suffix != ".html":  # --out runs/a/metrics.jsonl would cost the run its metrics
        raise UsageError(f"--out {page}: must end in .html")
    text = render_page(read_runs(runs))
    with os_faults(AbyssalError, page, "write the report"):
        write_text(page, text)
    typer.echo(f"report: {page}")
