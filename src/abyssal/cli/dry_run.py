"""What `abyssal train --dry-run` refuses and prints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from abyssal.config import RunConfig
    from abyssal.train.dry_run import DryRun
    from abyssal.train.dry_run.run import StageCost

READ = (
    "Read off tensors on the meta device, as a rank of the run makes them: parameters, weights, moments, gradients, "
    "gathered weights and casts; bytes of a row, of all-gather, reduce-scatter, all-reduce and pipeline."
)
PLANNED = (
    "The plan's: which blocks a stage holds, micro-batches under way (1F1B), activations of Abyssal's own trainer, "
    "which recomputes nothing, and how many rows go to experts that are all as likely."
)
EXCHANGE = "Not counted: the rows that Muon sends to the owners of whole matrices, and their updates, once a step each."


def refuse_without_dry_run(world_size: int | None, as_json: bool) -> None:
    """Raise UsageError where an option of the dry run alone was given to a real run."""
    from abyssal.errors import UsageError

    if world_size is not None:
        raise UsageError(
            f"--world-size {world_size}: of a dry run only (add --dry-run); a real run has as many ranks as are "
            f"started: torchrun --nproc-per-node {world_size} -m abyssal train ..."
        )
    if as_json:
        raise UsageError("--json: of a dry run only (add --dry-run); a real run writes its metrics.jsonl")


def print_dry_run(config: RunConfig, world_size: int | None, *, out: Path | None, resume: bool, as_json: bool) -> None:
    """Make a dry run over so many ranks, one if none are named, and print it.

    Raises:
        UsageError: the layout does not fit, or the command asks for what a dry run does not do.
    """
    from abyssal.errors import UsageError

    for option, is_set in ((f"--out {out}", out is not None), ("--resume", resume)):
        if is_set:
            raise UsageError(f"{option}: a dry run reads and writes no run's folder; leave it out")
    if "WORLD_SIZE" in os.environ:
        raise UsageError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: a dry run is one process, whatever --world-size is; start it "
            "without torchrun, or unset WORLD_SIZE"
        )
    ranks = 1 if world_size is None else world_size
    if ranks < 1:
        raise UsageError(f"--world-size {ranks}: must be at least 1")
    from abyssal.train.dry_run import dry_run

    run = dry_run(config, ranks)
    if as_json:
        typer.echo(json.dumps(facts(run), indent=2))
    else:
        _print(run, left_open=config.train.compute_dtype == "auto")


def facts(run: DryRun) -> dict[str, Any]:
    """Return every figure of a dry run, exact."""
    return {
        "name": run.config.name,
        "layout": {**asdict(run.layout), "world_size": run.layout.world_size, "dp_size": run.layout.dp_size},
        "compute_dtype": run.config.train.compute_dtype,
        "step": asdict(run.share),
        "elements": run.elements,
        "parts": {name: asdict(part) for name, part in run.parts.items()},
        "stages": [
            {
                "parts": dict(stage.cut.parts),
                "in_flight": stage.cut.in_flight,
                "elements": stage.elements,
                "local_elements": stage.local_elements,
                "memory": {**asdict(stage.memory), "total": stage.memory.total},
                "traffic": {**asdict(stage.communication), "bytes": stage.communication.bytes},
            }
            for stage in run.stages
        ],
    }


def _print(run: DryRun, *, left_open: bool) -> None:
    from rich.console import Console

    from abyssal.parallel.layout import describe

    console = Console(highlight=False, markup=False, soft_wrap=True)
    share, dtype = run.share, run.config.train.compute_dtype
    console.print(f"dry run of {run.config.name}: nothing is computed, read or written")
    console.print(describe(run.layout, run.config.model))
    console.print(
        f"a step: {share.sequences * run.layout.dp_size:,} sequences of {share.length:,} tokens, each rank "
        f"{share.sequences:,} of them in {share.micro_batches:,} micro-batches"
    )
    console.print(
        f"compute dtype: {dtype}"
        + (", since the recipe leaves it to the machine (train.compute_dtype)" if left_open else "")
    )
    _print_parts(console, run)
    _print_stages(console, run)
    _print_memory(console, run)
    _print_communication(console, run)
    console.print()
    console.print(READ, style="dim")
    console.print(PLANNED, style="dim")
    if run.config.optimizer.name == "muon" and run.layout.world_size > 1:
        console.print(EXCHANGE, style="dim")


def _print_parts(console: Console, run: DryRun) -> None:
    from abyssal.report.numbers import byte_size

    sizes = ("stored_bytes", "moment_bytes", "gradient_bytes", "use_bytes", "cast_bytes")
    rows = []
    for name, part in run.parts.items():
        elements = (part.sum("elements") + part.buffer_elements, part.sum("local_elements") + part.buffer_elements)
        rows.append((name, *(f"{n:,}" for n in elements), *(byte_size(part.sum(size)) for size in sizes)))
    _table(
        console,
        "each distinct part, and what the first rank of a stage has of it",
        ("part", "parameters", "of a rank", "weights", "moments", "gradient, whole", "gathered", "cast"),
        rows,
    )


def _print_stages(console: Console, run: DryRun) -> None:
    from abyssal.train.dry_run.parts import ONCE

    def row(stage: StageCost) -> tuple[str, ...]:
        parts = [
            part if part in ONCE else f"{count} {part}{'s' if count > 1 else ''}"
            for part, count in stage.cut.parts.items()
        ]
        return ", ".join(parts), f"{stage.elements:,}", f"{stage.local_elements:,}"

    headings = ("stage", "holds", "parameters", "of its first rank")
    _table(console, "each stage", headings, _collapsed(run.stages, row), left=2)
    names = {"main": "main model", "mtp": "MTP modules", "second_embedding": "second embedding"}
    counted = ", ".join(f"{names[key]} {count:,}" for key, count in run.elements.items() if count)
    console.print(f"parameters of all stages: {counted}")


def _print_memory(console: Console, run: DryRun) -> None:
    from abyssal.report.numbers import byte_size

    kinds = list(asdict(run.stages[0].memory))

    def row(stage: StageCost) -> tuple[str, ...]:
        sizes = [*asdict(stage.memory).values(), stage.memory.total]
        return str(stage.cut.in_flight), *map(byte_size, sizes)

    _table(
        console,
        f"memory of the first rank of a stage, ZeRO-{run.config.parallel.zero_stage}",
        ("stage", "micro-batches", *kinds, "total"),
        _collapsed(run.stages, row),
    )


def _print_communication(console: Console, run: DryRun) -> None:
    from abyssal.report.numbers import byte_size, short
    from abyssal.train.dry_run.cost import StepCommunication

    def figures(sent: StepCommunication) -> tuple[str, ...]:
        rows = sent.dispatch.rows, sent.dispatch.internode_rows
        sizes = sent.dispatch.bytes, sent.combine.bytes, sent.all_gather, sent.reduce_scatter
        return *map(short, rows), *map(byte_size, (*sizes, sent.all_reduce, sent.pipeline, sent.bytes))

    rows = _collapsed(run.stages, lambda stage: figures(stage.communication))
    rows.append(("all ranks", *figures(run.communication)))
    names = ("all-gather", "reduce-scatter", "all-reduce", "pipeline", "total")
    _table(
        console,
        "the first rank of a stage sends in a step, forward and backward",
        ("stage", "rows to experts", "to other nodes", "dispatch", "combine", *names),
        rows,
    )


def _collapsed(stages: Sequence[StageCost], row: Callable[[StageCost], tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return a row a stage with its number before it; neighbours with equal rows are one, such as `1-14`."""
    spans: list[tuple[int, int, tuple[str, ...]]] = []
    for number, stage in enumerate(stages):
        cells = row(stage)
        if spans and spans[-1][2] == cells:
            spans[-1] = (spans[-1][0], number, cells)
        else:
            spans.append((number, number, cells))
    return [(str(a) if a == b else f"{a}-{b}", *cells) for a, b, cells in spans]


def _table(
    console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1
) -> None:
    """Print a table with a line above it, its first `left` columns aligned to the left; figures are never cut."""
    console.print()
    console.print(title, style="bold")
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        cells = [
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        console.print("  ".join(cells))
