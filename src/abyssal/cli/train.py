"""`abyssal train`: a run from its recipe to its model directory."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abyssal.cli.recipe_options import Overrides, Recipe

if TYPE_CHECKING:
    from abyssal.config import RunConfig
    from abyssal.ranks.ranks import Ranks
    from abyssal.train.run_folder import RunFolder

DRY_RUN = "Dry run"

Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The run's folder.", show_default="runs/ and the recipe's name"),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint in that folder, with its recipe.")
]
StepBack = Annotated[
    bool,
    typer.Option(
        "--step-back",
        help="With --resume: where the newest checkpoint is damaged, set it aside and go on from the one before.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        rich_help_panel=DRY_RUN,
        help="Train nothing: say what each rank would hold and send, in seconds, in this process alone.",
    ),
]
WorldSize = Annotated[
    int | None,
    typer.Option("--world-size", rich_help_panel=DRY_RUN, metavar="RANKS", help="So many ranks.", show_default="1"),
]
AsJson = Annotated[bool, typer.Option("--json", rich_help_panel=DRY_RUN, help="Print JSON, figures exact.")]


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    step_back: StepBack = False,
    dry_run: DryRun = False,
    world_size: WorldSize = None,
    as_json: AsJson = False,
) -> None:
    """Train a model: prepare the data, run every step, and write a model directory.

    A run that was interrupted goes on with --resume, to the same losses as without the interruption. Examples:

        abyssal train demo
        abyssal train demo --set 'data.corpus=["my/code"]' --out runs/mine
        abyssal train demo --out runs/mine --resume
        abyssal train v3_671b --dry-run --world-size 2048
    """
    from rich.console import Console

    from abyssal.cli.dry_run import print_dry_run, refuse_without_dry_run
    from abyssal.cli.program import program
    from abyssal.config import load_recipe
    from abyssal.errors import Stopped, UsageError
    from abyssal.ranks.join import join
    from abyssal.train.run_folder import RunFolder

    config = load_recipe(recipe, overrides or [])  # a fault of the recipe needs no torch to be told
    if step_back and not resume:
        raise UsageError("--step-back: goes with --resume, which it is about")
    if dry_run:
        return print_dry_run(config, world_size, out=out, resume=resume, as_json=as_json)
    refuse_without_dry_run(world_size, as_json)
    folder = RunFolder(out or Path("runs") / config.name)
    with join(silence_s=config.parallel.silence_s) as ranks:
        try:
            model = _run(config, folder, ranks, overrides or [], resume=resume, step_back=step_back)
        except (KeyboardInterrupt, Stopped):
            if ranks.is_first:
                _print_interruption(recipe, folder, ranks.world_size)
            raise
    console = Console(highlight=False, soft_wrap=True, markup=False, quiet=not ranks.is_first)
    console.print(f"\nmodel directory: {model}")
    console.print(f"report: {folder.report}")
    console.print(f"try it: {program()} {shlex.join(['generate', str(model), '--prompt', 'def '])}")


def _run(
    config: RunConfig, folder: RunFolder, ranks: Ranks, overrides: list[str], *, resume: bool, step_back: bool
) -> Path:
    """Start the run, or go on with the one in the folder; return its model directory."""
    from rich.console import Console

    from abyssal.train import loop

    console = Console(quiet=not ranks.is_first)
    again = ranks.first(lambda: folder.is_of_launch(ranks.launch.id, config))
    if again:
        console.print("started again by its launcher", highlight=False)
    if not resume and not again:
        return loop.start(config, folder.path, console, ranks)
    if resume:
        name = folder.resolved_config().name
        console.print(
            f"going on with {folder.recipe}, the recipe {name!r} that this run was started with",
            highlight=False,
            markup=False,
        )
    changes = overrides if resume else []  # a run that was begun with them has them stored
    return loop.resume(folder.path, console, changes, ranks, recipe=config, step_back=step_back or again)


def _print_interruption(recipe: str, folder: RunFolder, world_size: int) -> None:
    """Say how the interrupted run is resumed."""
    from abyssal.cli.program import program

    if not folder.recipe.is_file():  # written before the first step
        typer.echo("\ninterrupted before the first step", err=True)
        return
    alone = f"{program()} {shlex.join(['train', recipe, '--out', str(folder.path)])}"
    command = f": {alone}" if world_size == 1 else " the same command, and"
    typer.echo(f"\ninterrupted; go on with{command} --resume", err=True)
