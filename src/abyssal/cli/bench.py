"""`abyssal bench serve`: load an OpenAI-compatible server and measure its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abyssal.errors import AbyssalError, UsageError

if TYPE_CHECKING:
    from abyssal.bench.client import RequestResult
    from abyssal.bench.measure import ServingResult
    from abyssal.bench.workload import Workload

NAMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "latency": "whole request",
}
COLUMNS = ("[ms]", "mean", "p50", "p90", "p95", "p99", "max")

bench = typer.Typer(name="bench", help="Measure how fast things are served.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Measure a server from outside, as its users meet it."""


@bench.command()
def serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server, such as http://127.0.0.1:8000.")],
    *,
    requests: Annotated[int, typer.Option(help="How many to send.")] = 64,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second on average, at random times.", show_default="none")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="So many at a time instead.", show_default="8 without a rate")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Length of a prompt, about.")] = 128,
    output_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64,
    shared_tokens: Annotated[int, typer.Option(help="So many at the beginning of all prompts are the same.")] = 0,
    spread: Annotated[float, typer.Option(help="Both lengths vary by this share up and down.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed sends the same requests.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of the answers.")] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask for answers of full length (vLLM, SGLang, Abyssal).")
    ] = False,
    completions: Annotated[bool, typer.Option("--completions", help="/v1/completions instead of chat.")] = False,
    model: Annotated[str | None, typer.Option(help="Its name there.", show_default="the first one listed")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the next byte.")] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with curves there (.html).")] = None,
) -> None:
    """Send requests to an OpenAI-compatible server, and say how long users wait for its first and next tokens.

    Any such server will do: Abyssal's, vLLM's, SGLang's. Answers are streamed. Times count from when a request was due.
    Exit code 1 if a request failed. Examples:

        abyssal bench serve http://127.0.0.1:8000 --concurrency 8
        abyssal bench serve http://127.0.0.1:8000 --rate 2.5 --requests 200 --spread 0.5 --plot serving.html
        abyssal bench serve http://127.0.0.1:8000 --prompt-tokens 1100 --shared-tokens 1000 --json serving.json
    """
    import asyncio

    from abyssal.bench.workload import Workload

    if rate is None and concurrency is None:
        concurrency = 8
    workload = Workload(requests, rate, concurrency, prompt_tokens, output_tokens, shared_tokens, spread, seed)
    if plot is not None and plot.suffix != ".html":
        raise UsageError(f"--plot {plot}: must end in .html")
    extra: dict[str, Any] = {"temperature": temperature} | ({"ignore_eos": True} if ignore_eos else {})
    connection = {"model": model, "api_key": api_key, "chats": not completions, "timeout_s": timeout_s, "extra": extra}
    name, result = asyncio.run(_measure(url, connection, workload))
    typer.echo(_table(name, result))
    if json_file is not None:
        _write(json_file, json.dumps(_record(url, name, workload, result), indent=1) + "\n")
    if plot is not None:
        _write(plot, _page(url, name, workload, result))
    if len(result.succeeded) < len(result.measured):
        raise AbyssalError(
            f"{len(result.measured) - len(result.succeeded)} of {len(result.measured)} requests failed; "
            f"most often: {next(iter(result.errors()))}"
        )


async def _measure(url: str, connection: dict[str, Any], workload: Workload) -> tuple[str, ServingResult]:
    """Run the workload under a progress bar; return the model's name and what was measured."""
    from rich.console import Console
    from rich.progress import Progress

    from abyssal.bench.client import Client
    from abyssal.bench.measure import calibrate, measure

    console = Console(stderr=True)
    async with Client.connect(url, **connection) as client:
        rate, overhead, told = await calibrate(client)
        if not told:
            typer.echo("note: the server reports no usage, so lengths are estimated, and tokens are chunks", err=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("requests", total=workload.num_requests)

            def note(_: RequestResult) -> None:
                bar.advance(task)

            return client.model, await measure(client, workload, (rate, overhead), note)


def _rows(result: ServingResult) -> list[list[str]]:
    """Return the table of times [ms], its head first."""
    rows = [list(COLUMNS)]
    for name, distribution in result.distributions().items():
        values = [distribution.mean, *distribution.quantiles.values(), distribution.most]
        rows.append([NAMES[name], *(f"{1000 * value:,.1f}" for value in values)])
    return rows


def _facts(result: ServingResult) -> dict[str, str]:
    """Return the totals as text."""
    totals = result.totals()
    facts = {
        "Requests": f"{totals['requests'] - totals['failed']:,} of {totals['requests']:,}",
        "Time": f"{totals['seconds']:.1f} s",
        "Requests/s": f"{totals['requests_per_s']:.2f}",
        "Output tokens/s": f"{totals['output_tokens_per_s']:,.1f}",
        "Output tokens": f"{totals['output_tokens']:,}",
    }
    if totals["prompt_tokens"] is not None:
        facts["Prompt tokens"] = f"{totals['prompt_tokens']:,}"
    if totals["acceptance"] is not None:
        facts["Drafts accepted"] = f"{totals['acceptance']:.1%}"
    return facts


def _table(name: str, result: ServingResult) -> str:
    """Return the totals and times for a terminal."""
    facts = _facts(result)
    lines = [name, *(f"  {fact:<18}{value:>16}" for fact, value in facts.items()), ""]
    for row in _rows(result):
        lines.append(f"  {row[0]:<22}" + "".join(f"{cell:>11}" for cell in row[1:]))
    lines += [f"  {count} failed: {sentence}" for sentence, count in result.errors().items()]
    return "\n".join(lines)


def _record(url: str, name: str, workload: Workload, result: ServingResult) -> dict[str, Any]:
    """Return everything that was measured, for other programs."""
    from dataclasses import asdict

    return {
        "url": url,
        "model": name,
        "workload": asdict(workload),
        **result.totals(),
        "errors": result.errors(),
        "times_s": {name: asdict(distribution) for name, distribution in result.distributions().items()},
        "measured": [asdict(one) for one in result.measured],
    }


def _page(url: str, name: str, workload: Workload, result: ServingResult) -> str:
    from dataclasses import asdict

    from abyssal.report.serving import ServingRecord, render_serving_page

    given: Mapping[str, object] = {key: value for key, value in asdict(workload).items() if value is not None}
    record = ServingRecord(
        url=url,
        model=name,
        facts=_facts(result),
        workload={key.removeprefix("num_").replace("_", " "): str(value) for key, value in given.items()},
        rows=_rows(result),
        errors=result.errors(),
        samples={NAMES[name]: values for name, values in result.samples().items()},
        courses=[(m.due_s, m.chunks_s[0] - m.due_s, m.ended_s - m.due_s) for m in result.succeeded if m.chunks_s],
        failed=[m.due_s for m in result.measured if m.error is not None],
    )
    return render_serving_page(record)


def _write(path: Path, text: str) -> None:
    from abyssal.files.atomic import write_text
    from abyssal.files.faults import os_faults

    with os_faults(AbyssalError, path, "write the figures"):
        write_text(path, text)
