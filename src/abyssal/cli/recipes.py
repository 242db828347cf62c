"""`abyssal recipes`: the recipes inside the package."""

from __future__ import annotations


def recipes() -> None:
    """List the packaged recipes with the size of their models."""
    from rich.console import Console
    from rich.table import Table

    from abyssal.config import load_recipe, packaged_recipes
    from abyssal.plan import count_parameters
    from abyssal.report.numbers import short

    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for heading in ("parameters", "with MTP", "activated"):
        table.add_column(heading, justify="right")
    table.add_column("what it is")
    for name in packaged_recipes():
        run = load_recipe(name)
        count = count_parameters(run.model)
        table.add_row(name, short(count.total), short(count.model), short(count.activated), run.description)
    Console().print(table)
