"""The text that `abyssal plan RECIPE` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from abyssal.plan.training_plan import StepPlan

RANKED = 12


def print_plan(facts: dict[str, Any], step: StepPlan, *, searched: bool, written: Sequence[Path]) -> None:
    """Print a plan section by section; `step` is drawn as a timeline where the terminal is wide enough."""
    from rich.console import Console

    console = Console(highlight=False)
    _print_head(console, facts)
    _print_phases(console, facts)
    _print_step(console, facts)
    _print_timeline(console, step)
    _print_memory(console, facts)
    _print_links(console, facts)
    _print_inference(console, facts["inference"])
    if searched:
        print_search(console, facts["search"])
    for path in written:
        console.print(f"written: {path}", markup=False)


def print_search(console: Console, found: dict[str, Any]) -> None:
    """Print layouts by step time, and why the others fail."""
    from abyssal.report.numbers import byte_size

    rows = [
        (
            row["layout"],
            f"{row['step_s']:.2f} s",
            f"{row['tokens_per_device_s']:,.0f}",
            f"{row['mfu']:.1%}",
            byte_size(row["memory_bytes"]),
        )
        for row in found["ranked"][:RANKED]
    ]
    console.print()
    console.print(
        f"layouts within {byte_size(found['memory_limit'])} a device: {found['fitting']:,}; the fastest, simulated",
        style="bold",
    )
    _table(console, ("layout", "step", "tokens/s a device", "MFU", "memory"), rows)
    for refused in found["refused"]:
        fail = "fails" if refused["count"] == 1 else "fail"
        console.print(
            f"{refused['count']:,} {fail}, such as {refused['layout']}: {refused['reason']}", style="dim", markup=False
        )


def _print_head(console: Console, facts: dict[str, Any]) -> None:
    from rich.markup import escape

    from abyssal.report.numbers import short

    cluster, layout, flops = facts["cluster"], facts["layout"], facts["flops_per_token"]
    title = f"{facts['name']} on {cluster['devices']:,} {cluster['name']}"
    console.print(
        f"[bold]{escape(title)}[/bold]" + (f": {escape(facts['description'])}" if facts["description"] else "")
    )
    console.print(f"layout: {layout['text']}, {layout['dp_size']} data-parallel ranks", markup=False)
    console.print(
        f"{short(facts['parameters']['total'])} parameters, {short(facts['parameters']['activated'])} activated; "
        f"FLOPs a token: training {short(flops['training'])} (without MTP "
        f"{short(flops['training_without_mtp'])}, not causal {short(flops['training_without_mtp_not_causal'])}), "
        f"prefill {short(flops['prefill'])}, decode {short(flops['decode'])}, at length {flops['sequence_length']:,}"
    )
    console.print()


def _print_phases(console: Console, facts: dict[str, Any]) -> None:
    from abyssal.report.numbers import short

    rows: list[tuple[str, ...]] = [
        (
            phase["name"],
            short(phase["tokens"]),
            f"{phase['steps']:,}",
            f"{phase['step_s']:.2f} s",
            f"{phase['tokens_per_device_s']:,.0f}",
            f"{phase['mfu']:.1%}",
            _days(phase["seconds"]),
            f"{phase['device_hours']:,.0f}",
            f"{phase['cost']:,.0f}",
        )
        for phase in facts["phases"]
    ]
    if facts["other_device_hours"]:
        hours = facts["other_device_hours"]
        rows.append(("given", *[""] * 6, f"{hours:,.0f}", f"{hours * facts['price_per_device_hour']:,.0f}"))
    if len(rows) > 1:
        rows.append(("total", *[""] * 6, f"{facts['device_hours']:,.0f}", f"{facts['cost']:,.0f}"))
    headings = ("phase", "tokens", "steps", "step", "tokens/s a device", "MFU", "time", "device hours", "money")
    _table(console, headings, rows)
    console.print(f"money at {facts['price_per_device_hour']:g} a device hour", style="dim")


def _print_step(console: Console, facts: dict[str, Any]) -> None:
    step, bubble = facts["step"], facts["bubble"]
    console.print()
    console.print(
        f"step of {step['tokens']:,} tokens: {step['seconds']:.2f} s; MFU {step['mfu']:.1%}, not causal "
        f"{step['mfu_not_causal']:.1%}",
        style="bold",
    )
    parts = step["parts"]
    names = list(next(iter(parts.values())))
    _table(
        console,
        ("seconds", *names),
        [(rank, *(f"{values[name]:.2f}" for name in names)) for rank, values in parts.items()],
    )
    console.print(
        f"exposed and imbalance: {step['exposed_and_imbalance_s']:.2f} s of them; bubble by {bubble['formula']}: "
        f"{bubble['closed_form_s']:.2f} s, simulated with unequal stages: {bubble['simulated_s']:.2f} s at most",
        style="dim",
        markup=False,
    )


def _print_timeline(console: Console, step: StepPlan) -> None:
    from abyssal.cli.plan_schedule import print_timeline
    from abyssal.plan.facts import drawable_timeline

    if step.layout.pp_size > 1:
        console.print()
        print_timeline(console, drawable_timeline(step))


def _print_memory(console: Console, facts: dict[str, Any]) -> None:
    from abyssal.report.numbers import byte_size

    memory = facts["memory"]
    ranks = memory["ranks"]
    shown = sorted({0, len(ranks) // 2, memory["fullest_rank"]})
    kinds = list(ranks[0])
    verdict = "fits" if memory["fits"] else memory["fault"]
    console.print(f"memory of a device, {byte_size(memory['limit'])}: {verdict}", style="bold", markup=False)
    rows = [(f"rank {rank}", *(byte_size(ranks[rank][kind]) for kind in kinds)) for rank in shown]
    _table(console, ("", *kinds), rows)


def _print_links(console: Console, facts: dict[str, Any]) -> None:
    from abyssal.report.numbers import byte_size

    links = facts["links"]
    rows = [(name, byte_size(size["nvlink"]), byte_size(size["network"])) for name, size in facts["traffic"].items()]
    console.print()
    console.print("a device sends in a step", style="bold")
    _table(console, ("", "NVLink", "network"), rows)
    console.print(
        f"an MoE layer and micro-batch: forward {1e3 * links['layer_forward_s']:.2f} ms, backward "
        f"{1e3 * links['layer_backward_s']:.2f} ms, communication {1e3 * links['layer_communication_s']:.2f} ms",
        style="dim",
    )


def _print_inference(console: Console, inference: dict[str, Any]) -> None:
    from abyssal.report.numbers import byte_size

    prefill, decode = inference["prefill"], inference["decode"]
    console.print()
    console.print(f"inference at context {inference['context']:,}, ceilings", style="bold")
    console.print(
        f"prefill: unit of {prefill['devices']}, {prefill['tokens_per_device_s']:,.0f} tokens/s a device; cache "
        f"{byte_size(inference['cache_bytes_per_token'])} a token"
    )
    rows = [
        (
            str(row["batch"]),
            f"{1e3 * row['seconds']:.2f} ms",
            f"{row['tokens_per_device_s']:,.0f}",
            f"{1e3 * row['memory_s']:.2f}",
            f"{1e3 * row['arithmetic_s']:.2f}",
            f"{1e3 * row['communication_s']:.2f}",
            " / ".join(f"{c['times']:.2f}" for c in inference["mtp_ceiling"] if c["batch"] == row["batch"]),
        )
        for row in decode["steps"]
    ]
    rates = " / ".join(dict.fromkeys(f"{c['acceptance']:g}" for c in inference["mtp_ceiling"]))
    headings = (f"decode, unit of {decode['devices']}: batch", "a token", "tokens/s a device", "memory ms")
    _table(console, (*headings, "arithmetic ms", "network ms", f"MTP at most, accepted {rates}"), rows)
    batch, bound = decode["compute_bound_batch"], decode["expert_parallel_bound_s"]
    sentences = [f"arithmetic outweighs memory from batch {batch:,}" if batch else "memory always outweighs arithmetic"]
    if bound is not None:
        sentences.append(f"expert-parallel bound at 32 tokens a micro-batch: {1e3 * bound:.2f} ms a token")
    console.print("; ".join(sentences), style="dim")


def _table(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _days(seconds: float) -> str:
    from abyssal.report.numbers import duration

    return duration(seconds)
