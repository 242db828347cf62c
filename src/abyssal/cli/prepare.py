"""`abyssal prepare`: documents become tokens, without training on them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from abyssal.cli.recipe_options import Overrides, Recipe


def prepare(
    recipe: Recipe,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder of tokenizer and shards.")],
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that tokenize; 0: one a core.")] = 0,
) -> None:
    """Make tokenizer and shards of a recipe without training, for one run or several.

    A run uses them with --set data.folder=DIR; its recipe must name the same documents. Example:

        abyssal prepare demo --set 'data.corpus=["my/code"]' --out my-data
    """
    from rich.console import Console

    from abyssal.cli.program import program
    from abyssal.config import load_recipe
    from abyssal.data.prepare import prepare as prepare_data
    from abyssal.machine.describe import available_cores

    config = load_recipe(recipe, overrides or [])
    manifest = prepare_data(
        config.data,
        config.tokenizer,
        config.model.vocab_size,
        out,
        seed=config.seed,
        workers=workers or available_cores(),
        progress=sys.stderr.isatty(),
    )
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for name, split in manifest.splits.items():
        console.print(
            f"{name:>10}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens",
        )
    for source in manifest.sources:
        console.print(f"{source.name:>10}: {source.documents:,} documents, {source.tokens:,} tokens to train on")
    if any(number for _, number in manifest.dropped):
        console.print(f"{'left out':>10}: {manifest.dropped.sentence()}")
    changes = [word for change in (*(overrides or []), f"data.folder={out}") for word in ("--set", change)]
    console.print(f"\ntrain on it: {program()} {shlex.join(['train', recipe, *changes])}")
