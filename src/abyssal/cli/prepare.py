"""`abyssal prepare`: documents become tokens, without training on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prepare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A packaged recipe's name, or a .toml file.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder of tokenizer and shards.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a field of the recipe; may be repeated."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that tokenize; 0: one a core.")] = 0,
) -> None:
    """Make the data folder of a recipe; train on it with --set data.folder=DIR.

    Example:

        abyssal prepare demo --set 'data.corpus=["my/texts"]' --out my-data
    """
    import os

    from rich.console import Console

    from abyssal.config import load_recipe
    from abyssal.data.prepare import prepare as prepare_data

    config = load_recipe(recipe, overrides or [])
    manifest = prepare_data(
        config.data,
        config.tokenizer,
        config.model.vocab_size,
        out,
        seed=config.seed,
        workers=workers or os.cpu_count() or 1,
        progress=True,
    )
    console = Console()
    for name, split in manifest.splits.items():
        console.print(
            f"{name:>10}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens",
            highlight=False,
        )
    console.print(f"in {out}; train on it with --set data.folder={out}", highlight=False)
