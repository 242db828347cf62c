"""`abyssal plan experts`: which expert lives on which GPU, by load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from abyssal.plan.expert_loads import ExpertLoads
    from abyssal.plan.placement import Placement


def experts(
    source: Annotated[
        Path, typer.Argument(metavar="LOADS", help="A JSON file of loads, a run's folder, or its expert_load.jsonl.")
    ],
    gpus: Annotated[int, typer.Option("--gpus", help="GPUs that share the experts of a layer.")],
    redundant: Annotated[int, typer.Option("--redundant", help="Copies beyond one of each expert, a layer.")] = 0,
    groups: Annotated[int, typer.Option("--groups", help="Groups of experts of the gate (n_group).")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", help="Nodes that the GPUs stand in.")] = 1,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of a run: how many last steps to add up.")] = 100,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw before and after.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: the expert in each place of each GPU.")] = False,
) -> None:
    """Copy the busiest experts and pack all of them onto GPUs so that these are loaded alike.

    The policy is that of the published load balancer: hierarchical where the nodes divide the groups, so that a group
    stays on one node, and global otherwise. Examples:

        abyssal plan experts loads.json --gpus 8 --redundant 4 --groups 4 --nodes 2
        abyssal plan experts loads.json --gpus 8 --redundant 4 --svg experts.svg
    """
    from abyssal.cli.output_file import write_output
    from abyssal.plan.expert_loads import read_loads
    from abyssal.plan.placement import place_experts, placement_in_order
    from abyssal.report.placement import draw_placement

    read = read_loads(source, steps)
    placed = place_experts(read.loads, redundant=redundant, gpus=gpus, groups=groups, nodes=nodes)
    before = placement_in_order(len(read.loads), len(read.loads[0]), gpus)
    if svg:
        drawing = draw_placement(read.layers, before.gpu_loads(read.loads), placed.gpu_loads(read.loads))
        write_output("--svg", svg, ".svg", drawing)
    if as_json:
        facts = {
            "source": read.source,
            "imbalance_before": dict(zip(read.layers, before.imbalance(read.loads), strict=True)),
            "imbalance_after": dict(zip(read.layers, placed.imbalance(read.loads), strict=True)),
            "placement": {
                layer: [placed.on_gpu(number, gpu) for gpu in range(gpus)] for number, layer in enumerate(read.layers)
            },
        }
        typer.echo(json.dumps(facts))
        return
    from rich.console import Console

    is_global = nodes == 1 or groups % nodes  # no group is kept together
    policy = "any copy on any GPU" if is_global else f"{groups} groups kept whole on {nodes} nodes"
    console = Console(highlight=False)
    print_placement(console, read, before, placed, policy)
    if svg:
        console.print(f"written: {svg}", markup=False)


def print_placement(console: Console, read: ExpertLoads, before: Placement, placed: Placement, policy: str) -> None:
    """Print how evenly GPUs are loaded before and after, and what was copied."""
    from rich.table import Table

    layers, experts, places = len(read.layers), len(read.loads[0]), len(placed.experts[0])
    console.print(f"{layers} layers of {experts} experts; load: {read.source}", markup=False)
    console.print(
        f"{places} places on {placed.gpus} GPUs, {places // placed.gpus} each: {places - experts} redundant; {policy}"
    )
    console.print()
    grid = Table(box=None, pad_edge=False)
    grid.add_column("busiest GPU over the mean", no_wrap=True)
    grid.add_column("worst layer", justify="right")
    grid.add_column("mean of layers", justify="right")
    for title, placement in (("before: in order, none copied", before), ("after", placed)):
        values = placement.imbalance(read.loads)
        worst = max(range(layers), key=values.__getitem__)
        grid.add_row(title, f"{values[worst]:.3f} (layer {read.layers[worst]})", f"{sum(values) / layers:.3f}")
    console.print(grid)
    if placed.num_duplicates:
        console.print(
            "copies that share a GPU with another one of the same expert, and so spread nothing: "
            f"{placed.num_duplicates}"
        )
