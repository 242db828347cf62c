"""The options of `abyssal plan RECIPE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

LAYOUT = "Layout (none of these: the report's where it fits, else the fastest that is found)"
OUTPUT = "Output"

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A packaged recipe or a .toml file.")]
Cluster = Annotated[str, typer.Option("--cluster", metavar="CHIP:DEVICES", help="h800:2048, h100:64, ...")]
Hardware = Annotated[
    Path | None, typer.Option("--hardware", metavar="FILE", help="A TOML file with chips of your own.")
]
Tokens = Annotated[str | None, typer.Option("--tokens", help="Length of the run: 14.8T, 300B, 1e9.")]
Batch = Annotated[int | None, typer.Option("--batch", help="Sequences a step, in place of the schedule.")]
Then = Annotated[
    list[str] | None,
    typer.Option("--then", metavar="RECIPE", help="A phase that follows on the same devices; may be repeated."),
]
OtherHours = Annotated[float, typer.Option("--other-hours", help="Device hours to add: post-training.")]
Price = Annotated[float, typer.Option("--price", help="Money a device hour.")]
Schedule = Annotated[str | None, typer.Option("--schedule", rich_help_panel=LAYOUT, help="dualpipe, 1f1b, ...")]
Pp = Annotated[int | None, typer.Option("--pp", rich_help_panel=LAYOUT, help="Pipeline ranks.")]
Ep = Annotated[int | None, typer.Option("--ep", rich_help_panel=LAYOUT, help="Expert-parallel devices.")]
Tp = Annotated[int | None, typer.Option("--tp", rich_help_panel=LAYOUT, help="Tensor-parallel devices.")]
Cp = Annotated[int | None, typer.Option("--cp", rich_help_panel=LAYOUT, help="Context-parallel devices.")]
StagesPerRank = Annotated[
    int | None, typer.Option("--stages-per-rank", rich_help_panel=LAYOUT, help="Of the schedule interleaved.")
]
MicroBatch = Annotated[
    int | None, typer.Option("--micro-batch", rich_help_panel=LAYOUT, help="Sequences a micro-batch.")
]
Precision = Annotated[
    str | None, typer.Option("--precision", rich_help_panel=LAYOUT, help="fp8 (where the chip has it) or bf16.")
]
Recompute = Annotated[str | None, typer.Option("--recompute", rich_help_panel=LAYOUT, help="published, none or full.")]
Overlap = Annotated[
    bool | None,
    typer.Option("--overlap/--no-overlap", rich_help_panel=LAYOUT, help="All-to-all under computation."),
]
Search = Annotated[bool, typer.Option("--search", help="Rank layouts by step time, and say why others fail.")]
Memory = Annotated[
    float | None, typer.Option("--memory", metavar="GB", help="Memory limit a device.", show_default="the chip's")
]
AsJson = Annotated[bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print JSON, figures exact.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", rich_help_panel=OUTPUT, help="Write a page.")]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", rich_help_panel=OUTPUT, help="Write a trace of a step for Perfetto."),
]
