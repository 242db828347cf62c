"""`abyssal demo`: one command trains a DeepSeek-V3 on real text, and it completes code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abyssal.cli.recipe_options import Overrides

MINUTES = 8.0


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The run's folder.")] = Path("runs/demo"),
    minutes: Annotated[
        float | None,
        typer.Option(min=0.01, help="Time for the training steps on this machine.", show_default=f"{MINUTES:g}"),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Train a small DeepSeek-V3 on the Python standard library's source and let it complete code.

    Ctrl-C stops the run, and the same command goes on with it. Once it is finished, the command only shows the
    model. Examples:

        abyssal demo
        abyssal demo --minutes 2 --out runs/short
    """
    from rich.console import Console

    from abyssal.cli.program import program
    from abyssal.config import load_recipe
    from abyssal.demo.run import run_demo
    from abyssal.errors import Stopped
    from abyssal.train.run_folder import RunFolder

    budget = MINUTES if minutes is None else minutes
    config = load_recipe("demo", [f"train.time_budget_s={60 * budget}", *(overrides or [])])
    given = [name for name, value in (("--minutes", minutes), ("--set", overrides)) if value]
    if given and RunFolder(out).recipe.is_file():
        typer.echo(
            f"note: {' and '.join(given)}: no effect, since the run in {out} keeps the recipe it was started with; "
            "choose another --out for another run",
            err=True,
        )
    try:
        run_demo(config, out, Console(), program())
    except (KeyboardInterrupt, Stopped):
        typer.echo("\ninterrupted; the same command goes on from the newest checkpoint", err=True)
        raise
