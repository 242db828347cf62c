"""`abyssal demo`: one command trains a DeepSeek-V3 on real text, and it completes code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The run's folder.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(min=0.1, help="Time for training, on this machine.")] = 8.0,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a field of the demo recipe."),
    ] = None,
) -> None:
    """Train a small DeepSeek-V3 on the Python standard library's source and let it complete code."""
    from rich.console import Console

    from abyssal.config import load_recipe
    from abyssal.demo.story import run_demo

    config = load_recipe("demo", [f"train.time_budget_s={minutes * 60}", *(overrides or [])])
    run_demo(config, out, Console())
