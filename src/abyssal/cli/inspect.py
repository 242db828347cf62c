"""`abyssal inspect`: what a recipe or a model directory comes to, before anything is trained or loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abyssal.cli.recipe_options import Overrides

if TYPE_CHECKING:
    from rich.console import Console

    from abyssal.config import ModelConfig, RunConfig, ValueSchedule

#: At this length the report states its figures; a model directory says nothing of the length it was trained at.
USUAL_LENGTH = 4096


def inspect(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|MODEL_DIR", help="A recipe, or a folder with a config.json.")
    ],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, all figures exact.")] = False,
) -> None:
    """Show parameters, FLOPs and cache of a model, its files or the schedules of its run; no weight is read.

    Examples:

        abyssal inspect v3_671b
        abyssal inspect demo --set model.num_hidden_layers=8
        abyssal inspect runs/demo/model --json
    """
    from rich.console import Console
    from rich.markup import escape

    from abyssal.cli.model_argument import refuse_run_folder
    from abyssal.config import ModelConfig, load_recipe, packaged_recipes
    from abyssal.errors import UsageError

    run: RunConfig | None = None
    if Path(target).is_dir() and target not in packaged_recipes():
        refuse_run_folder(Path(target))
        if overrides:
            raise UsageError(f"--set {overrides[0]}: only a recipe can be changed, but {target} is a model directory")
        model = ModelConfig.from_json(Path(target) / "config.json")
    else:
        run = load_recipe(target, overrides or [])
        model = run.model
    facts = model_facts(model, run.train.sequence_length if run else min(USUAL_LENGTH, model.max_position_embeddings))
    if run:
        facts |= {"name": run.name, "description": run.description, "run": run_facts(run)}
    else:
        facts["weights"] = weight_facts(Path(target), model)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = Console(highlight=False)
    if run:
        console.print(f"[bold]{run.name}[/bold]" + (f": {escape(run.description)}" if run.description else ""))
        console.print()
    print_model(console, facts)
    if run:
        print_run(console, run, facts["run"])
    else:
        print_weights(console, facts["weights"], model)


def model_facts(model: ModelConfig, length: int) -> dict[str, Any]:
    """Return every figure of a model; FLOPs at sequences, and a context, of `length` tokens."""
    from dataclasses import asdict

    from abyssal.plan import cache_bytes_per_token, count_parameters, decode_flops, training_flops

    count = count_parameters(model)
    return {
        "parameters": {
            "total": count.total,
            "activated": count.activated,
            "activated_without_embedding": count.activated_without_embedding,
            "mtp": count.mtp.total,
            "mtp_activated": count.activated_mtp.total,
            "release": count.release,
            "parts": {
                name: asdict(getattr(count, name)) for name in ("main", "activated_main", "mtp", "activated_mtp")
            },
        },
        "flops_per_token": {
            "sequence_length": length,
            "training": training_flops(model, length).total,
            "training_without_mtp": training_flops(model, length, mtp=False).total,
            "training_without_mtp_not_causal": training_flops(model, length, mtp=False, causal=False).total,
            "decode": decode_flops(model, length).total,
        },
        "cache_bytes_per_token": cache_bytes_per_token(model),
        "max_position_embeddings": model.max_position_embeddings,
    }


def weight_facts(folder: Path, model: ModelConfig) -> dict[str, Any] | None:
    """Return what the headers of a model directory's weight files say; none where there is no such file.

    Raises:
        ModelDirectoryError: files that are damaged, missing or not safetensors.
    """
    from dataclasses import asdict

    from abyssal.checkpoint.hf import ModelReader
    from abyssal.checkpoint.hf.inventory import has_weights, weight_inventory

    if not has_weights(folder):
        return None
    inventory = weight_inventory(ModelReader(folder, model))
    return asdict(inventory) | {"bytes": inventory.bytes}


def run_facts(run: RunConfig) -> dict[str, Any]:
    """Return the length of a run and its schedules."""
    from abyssal.plan import count_steps

    return {
        "tokens": run.train.tokens,
        "time_budget_s": run.train.time_budget_s,
        "steps": count_steps(run),
        "sequence_length": run.train.sequence_length,
        "tokens_per_step_at_start": run.batch_size_at(0) * run.train.sequence_length,
        "tokens_per_step_at_end": run.batch_size_at(run.train.tokens) * run.train.sequence_length,
        "schedule": run.schedule.model_dump(),
    }


def print_model(console: Console, facts: dict[str, Any]) -> None:
    """Print parameters by part, then what a token costs."""
    from rich.table import Table

    from abyssal.report.numbers import byte_size, short

    parts = facts["parameters"]["parts"]
    table = Table(box=None, pad_edge=False)
    table.add_column("parameters", no_wrap=True)
    for heading in ("main model", "activated", "MTP", "activated"):
        table.add_column(heading, justify="right")
    for part in parts["main"]:
        numbers = [parts[column][part] for column in parts]
        if any(numbers):
            table.add_row(part.replace("_", " "), *(f"{n:,}" if n else "" for n in numbers))
    table.add_section()
    table.add_row("total", *(f"{sum(column.values()):,}" for column in parts.values()), style="bold")
    console.print(table)

    parameters, flops = facts["parameters"], facts["flops_per_token"]
    cache, length = facts["cache_bytes_per_token"], flops["sequence_length"]
    rows = [
        ("total", f"{short(parameters['total'])} parameters, {short(parameters['activated'])} activated a token"),
        ("files", f"{short(parameters['release'])} with the MTP modules and their copies of embedding and head"),
        (
            "training",
            f"{short(flops['training'])} FLOPs a token at length {length:,}; without MTP "
            f"{short(flops['training_without_mtp'])} (attention counted as not causal: "
            f"{short(flops['training_without_mtp_not_causal'])})",
        ),
        ("decoding", f"{short(flops['decode'])} FLOPs a token at context {length:,}, from the latent cache"),
        (
            "cache",
            f"{cache:,} bytes a token in bfloat16; {byte_size(cache * facts['max_position_embeddings'])} for the whole "
            f"context of {facts['max_position_embeddings']:,}",
        ),
    ]
    console.print()
    _print_rows(console, rows)


def print_weights(console: Console, facts: dict[str, Any] | None, model: ModelConfig) -> None:
    """Print what the files hold, how it lies in them, and what is missing or does not belong there."""
    from rich.markup import escape

    from abyssal.report.numbers import byte_size

    if facts is None:
        rows = [("weights", "no files")]
    else:
        files, sizes = facts["num_files"], facts["bytes_by_dtype"]
        by_dtype = ", ".join(f"{byte_size(size)} {dtype}" for dtype, size in sizes.items())
        scales = f"; FP8 with scales in {' and '.join(facts['scales'])}" if facts["scales"] else ""
        modules = model.num_nextn_predict_layers
        layout = f"experts {facts['experts']}, head {facts['head']}, {facts['mtp_modules']} of {modules} MTP modules"
        rows = [
            ("weights", f"{facts['num_tensors']:,} tensors in {files} file{'s' if files > 1 else ''}: {by_dtype}"),
            ("layout", layout + scales),
        ]
        for kind in ("missing", "surplus"):
            rows += [(kind, escape(", ".join(facts[kind])))] if facts[kind] else []
        for kind, heading in (("misshaped", "shape"), ("mistyped", "type")):
            rows += [(heading, escape(f"{name} is {fault}")) for name, fault in facts[kind].items()]
        if facts["missing_files"]:
            rows.append(("no file", ", ".join(facts["missing_files"])))
    console.print()
    _print_rows(console, rows)


def print_run(console: Console, run: RunConfig, facts: dict[str, Any]) -> None:
    """Print the length of a run and each schedule in words."""
    from abyssal.report.numbers import short

    first, last = facts["tokens_per_step_at_start"], facts["tokens_per_step_at_end"]
    batch = short(first) if first == last else f"{short(first)} to {short(last)}"
    length = f"{short(facts['tokens'])} tokens in {facts['steps']:,} steps of {batch} tokens"
    if run.train.time_budget_s is not None:
        length = f"what fits into {run.train.time_budget_s:g} s on this machine, measured at its start; else {length}"
    rows = [("run", f"{length}; sequences of {facts['sequence_length']:,}")]
    for name in type(run.schedule).model_fields:
        rows.append((name.replace("_", " "), describe_schedule(getattr(run.schedule, name))))
    console.print()
    _print_rows(console, rows)


def describe_schedule(schedule: ValueSchedule) -> str:
    """Write a schedule as a sentence: `0, linear to 0.00022 at 28.1B, constant until 10T`."""
    from abyssal.report.numbers import short

    words, value = [f"{schedule.start:g}"], schedule.start
    for segment in schedule.segments:
        if schedule.unit == "tokens":
            until = short(segment.until)
        else:
            until = "the end" if segment.until == 1 else f"{100 * segment.until:.4g}% of the run"
        target = value if segment.to is None else segment.to
        if segment.shape != "constant":
            words.append(f"{segment.shape} to {target:g} at {until}")
        else:
            words.append(f"constant until {until}" if target == value else f"{target:g} until {until}")
        value = target
    return ", ".join(words)


def _print_rows(console: Console, rows: list[tuple[str, str]]) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for row in rows:
        table.add_row(*row)
    console.print(table)
