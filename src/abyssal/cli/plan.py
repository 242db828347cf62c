"""`abyssal plan`: what a run costs in time, memory and money, without torch and without an accelerator."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from abyssal.cli import plan_options as options
from abyssal.cli.recipe_options import Overrides

if TYPE_CHECKING:
    from abyssal.config import RunConfig
    from abyssal.plan.calibration import Calibration
    from abyssal.plan.hardware import Cluster
    from abyssal.plan.layout import Layout
    from abyssal.plan.search import SearchResult
    from abyssal.plan.training_plan import StepPlan

PLAN_HELP = """What a run costs, before anything is bought: abyssal plan RECIPE --cluster CHIP:DEVICES.

The other commands look at a schedule alone, and at the placement of experts.
"""


class PlanGroup(TyperGroup):
    """The commands of `abyssal plan`; what is none of them is a recipe, or an option of the plan of one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the plan's own command before its arguments."""
        if args and args[0] not in (*self.commands, "--help"):
            args = ["recipe", *args]
        return list(super().parse_args(ctx, args))


def plan_recipe(
    recipe: options.Recipe,
    cluster: options.Cluster,
    hardware: options.Hardware = None,
    overrides: Overrides = None,
    tokens: options.Tokens = None,
    batch: options.Batch = None,
    then: options.Then = None,
    other_hours: options.OtherHours = 0.0,
    price: options.Price = 2.0,
    schedule: options.Schedule = None,
    pp: options.Pp = None,
    ep: options.Ep = None,
    tp: options.Tp = None,
    cp: options.Cp = None,
    stages_per_rank: options.StagesPerRank = None,
    micro_batch: options.MicroBatch = None,
    precision: options.Precision = None,
    recompute: options.Recompute = None,
    overlap: options.Overlap = None,
    search: options.Search = False,
    memory: options.Memory = None,
    as_json: options.AsJson = False,
    html: options.Html = None,
    trace: options.Trace = None,
) -> None:
    """Predict a run: does it fit, how long is a step, where does the time go, what does it cost.

    Examples:

        abyssal plan v3_671b --cluster h800:2048
        abyssal plan v3_671b --cluster h800:2048 --then v3_671b_32k --then v3_671b_128k --other-hours 5000
        abyssal plan v3_671b --cluster h100:1024 --precision bf16 --search
        abyssal plan v3_16b --cluster h100:64 --tokens 300B --html plan.html
    """
    from abyssal.cli.plan_text import print_plan
    from abyssal.plan.calibration import Calibration
    from abyssal.plan.facts import plan_facts, search_facts
    from abyssal.plan.hardware import packaged_chips, parse_cluster, read_chips
    from abyssal.plan.inference import inference_facts
    from abyssal.plan.training_plan import plan_training

    devices = parse_cluster(cluster, packaged_chips() | (read_chips(hardware) if hardware else {}))
    runs = load_runs(recipe, then or [], overrides or [], tokens, batch)
    check_money(price, other_hours, memory)
    limit = devices.chip.memory_bytes if memory is None else memory * 1e9
    calibration = Calibration()
    choices = {
        "schedule": schedule, "pp_size": pp, "ep_size": ep, "tp_size": tp, "cp_size": cp, "overlap": overlap,
        "stages_per_rank": stages_per_rank, "micro_batch_size": micro_batch,
        "precision": precision, "recompute": recompute,
    }  # fmt: skip
    layout, result = choose_layout(runs[0], devices, choices, calibration, limit, searched=search)
    training = replace(plan_training(runs, devices, layout, calibration, price), other_hours=other_hours)
    step = training.phases[0].step
    refuse_excess(step, calibration, limit)
    facts = plan_facts(training, limit) | {"inference": inference_facts(runs[0].model, devices, calibration)}
    if result is not None:
        facts["search"] = search_facts(result, limit)
    write_files(step, facts, html, trace)
    if as_json:
        return typer.echo(json.dumps(facts, indent=2))
    print_plan(facts, step, searched=search, written=[path for path in (html, trace) if path])


def load_runs(
    recipe: str, then: list[str], overrides: list[str], tokens: str | None, batch: int | None
) -> list[RunConfig]:
    """Return the run, with the length and the batch that the options say, and the phases after it."""
    from abyssal.config import load_recipe
    from abyssal.errors import UsageError

    settings = [*overrides]
    if tokens is not None:
        settings.append(f"train.tokens={read_count(tokens)}")
    if batch is not None:
        if batch < 1:
            raise UsageError(f"--batch {batch}: must be at least 1 sequence")
        settings += [f"schedule.batch_size={{start = {batch}, segments = []}}"]
    return [load_recipe(recipe, settings), *(load_recipe(name) for name in then)]


def read_count(text: str) -> int:
    """Read a number of tokens: 14.8T, 300B, 1e9, 12000.

    Raises:
        UsageError: no number, or none from 1 to 10^18.
    """
    from abyssal.errors import UsageError

    factor = {"T": 1e12, "B": 1e9, "M": 1e6, "K": 1e3}.get(text[-1:].upper())
    try:
        value = float(text[:-1] if factor else text) * (factor or 1.0)
    except ValueError:
        raise UsageError(f"--tokens {text}: must be a number, such as 14.8T, 300B or 1e9") from None
    if not 1 <= value <= 1e18:
        raise UsageError(f"--tokens {text}: must be from 1 to 10^18")
    return round(value)


def check_money(price: float, other_hours: float, memory: float | None) -> None:
    """Raise UsageError where a price, a number of hours or a limit makes no sense."""
    from abyssal.errors import UsageError

    for option, value, most in (("--price", price, 1e6), ("--other-hours", other_hours, 1e12)):
        if not 0 <= value <= most:
            raise UsageError(f"{option} {value:g}: must be from 0 to {most:g}")
    if memory is not None and not 0 < memory <= 1e6:
        raise UsageError(f"--memory {memory:g}: must be a number of GB above 0 and at most 1e6")


def choose_layout(
    run: RunConfig, cluster: Cluster, choices: dict[str, Any], calibration: Calibration, limit: float, *, searched: bool
) -> tuple[Layout, SearchResult | None]:
    """Return the layout of the options, or the best one where they choose none that fits; and the search, if any.

    Raises:
        UsageError: no layout fits.
    """
    from abyssal.plan.search import search

    layout, has_degrees = start_layout(cluster, choices)
    is_usable = has_degrees or fits(run, cluster, layout, calibration, limit)
    result = search(run, cluster, layout, calibration, limit) if searched or not is_usable else None
    return layout if is_usable or result is None else best_of(result), result


def start_layout(cluster: Cluster, choices: dict[str, Any]) -> tuple[Layout, bool]:
    """Return the layout of the options, and whether they choose degrees; without degrees it is the report's."""
    from abyssal.plan.layout import PUBLISHED, Layout, Precision

    degrees = ("schedule", "pp_size", "ep_size", "tp_size", "stages_per_rank")
    chosen = any(choices[name] is not None for name in degrees)
    if cluster.chip.sms is None:  # no accelerator: Abyssal's own trainer, as it is
        base = Layout(precision="bf16", recompute="none", state="trainer")
    else:
        precision: Precision = "bf16" if cluster.chip.fp8_flops is None else "fp8"
        base = replace(Layout() if chosen else PUBLISHED, precision=precision)
    return replace(base, **{name: value for name, value in choices.items() if value is not None}), chosen


def fits(run: RunConfig, cluster: Cluster, layout: Layout, calibration: Calibration, limit: float) -> bool:
    """Return whether a layout divides the devices and stays within the memory."""
    from abyssal.errors import UsageError
    from abyssal.plan.rank_memory import memory_fault
    from abyssal.plan.training_plan import plan_step

    try:
        step = plan_step(run, cluster, layout, calibration)
    except UsageError:
        return False
    return memory_fault(layout, step.memory, limit) is None


def best_of(result: SearchResult) -> Layout:
    """Return the fastest layout of a search.

    Raises:
        UsageError: there is none; says why of the closest, and what else fails.
    """
    from abyssal.errors import UsageError

    if result.ranked:
        return result.ranked[0].layout
    most = sorted(result.refused, key=lambda refused: -refused.count)[:2]
    reasons = "; ".join(f"{r.count} of those tried, such as {r.layout}: {r.reason}" for r in most)
    raise UsageError(
        f"no layout fits: {reasons or 'none divides these devices'}; try other devices, --batch or --memory"
    )


def refuse_excess(step: StepPlan, calibration: Calibration, limit: float) -> None:
    """Raise UsageError where a device needs more memory than it has, with the nearest layout that fits."""
    from abyssal.errors import UsageError
    from abyssal.plan.facts import layout_options
    from abyssal.plan.rank_memory import memory_fault
    from abyssal.plan.search import nearest_fitting

    fault = memory_fault(step.layout, step.memory, limit)
    if fault is None:
        return
    near = nearest_fitting(step.run, step.cluster, step.layout, calibration, limit)
    hint = (
        f"nearest layout that fits: {' '.join(layout_options(near))}" if near else "no layout fits; take more devices"
    )
    raise UsageError(f"{step.layout} on {step.cluster.name}:{step.cluster.devices}: {fault}; {hint}")


def write_files(step: StepPlan, facts: dict[str, Any], html: Path | None, trace: Path | None) -> None:
    """Write the page and the trace that were asked for."""
    from abyssal.cli.output_file import write_output

    if trace:
        from abyssal.plan.schedules import trace as trace_events

        write_output("--trace", trace, ".json", json.dumps(trace_events(step.timeline)))
    if html:
        from abyssal.plan.facts import drawable_timeline
        from abyssal.plan.schedules import boxes
        from abyssal.report.plan_page import render_plan
        from abyssal.report.timeline import draw_timeline

        drawn = drawable_timeline(step)
        picture = draw_timeline(
            boxes(drawn), description=f"One step of {facts['name']} on {facts['layout']['text']}", unit="s"
        )
        write_output("--html", html, ".html", render_plan(facts, picture, drawn.schedule.micro_batches))
