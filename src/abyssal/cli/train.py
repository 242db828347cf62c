"""`abyssal train`: a run from its recipe to its model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A packaged recipe's name, or a .toml file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a field of the recipe; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The run's folder.", show_default="runs/ and the recipe's name"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run in that folder.")
    ] = False,
) -> None:
    """Train a model: prepare the data, run every step, and write a model directory.

    A run that was interrupted goes on with --resume, as if nothing had happened. Examples:

        abyssal train demo
        abyssal train demo --set 'data.corpus=["my/texts"]' --out runs/mine
        abyssal train demo --out runs/mine --resume
    """
    from rich.console import Console

    from abyssal.config import load_recipe
    from abyssal.errors import UsageError
    from abyssal.train import loop

    config = load_recipe(recipe, overrides or [])
    folder = out or Path("runs") / config.name
    console = Console()
    if resume:
        if overrides:
            raise UsageError(
                f"--set {overrides[0]}: a resumed run keeps the recipe it was started with; leave --set out"
            )
        model = loop.resume(folder, console)
    else:
        model = loop.start(config, folder, console)
    console.print(f"\nmodel directory: [bold]{model}[/bold]", highlight=False)
    console.print(f"try it: abyssal generate {model} --prompt 'def '", highlight=False)
