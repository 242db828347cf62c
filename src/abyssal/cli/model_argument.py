"""The model directory that a command is given."""

from __future__ import annotations

from pathlib import Path

from abyssal.cli.program import program
from abyssal.errors import UsageError


def refuse_run_folder(path: Path) -> None:
    """Raise where `path` is the folder of a run, whose model directory is one level further down.

    Raises:
        UsageError: it is; names the model directory, or how the run comes to one.
    """
    from abyssal.train.run_folder import RunFolder

    run = RunFolder(path)
    if (path / "config.json").exists() or not run.recipe.is_file():
        return
    if run.model.is_dir():
        raise UsageError(f"{path}: is the folder of a run; its model directory is {run.model}")
    raise UsageError(
        f"{path}: is the folder of a run without a model yet; "
        f"finish it with: {program()} train {run.recipe} --out {path} --resume"
    )
