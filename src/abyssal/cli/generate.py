"""`abyssal generate`: continue a prompt with a model directory, or every prompt of a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abyssal.errors import DataError, UsageError

if TYPE_CHECKING:
    from abyssal.engine import FinishReason, SamplingParameters, Speculation
    from abyssal.engine.generation_config import GenerationDefaults

Model = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="A folder with config.json, safetensors and tokenizer.json.")
]
Prompt = Annotated[str | None, typer.Option(help="Text to continue; - reads it from standard input.")]
Input = Annotated[
    Path | None, typer.Option("--input", help="Many prompts or conversations at once: a JSONL file, a line each.")
]
Output = Annotated[
    Path | None, typer.Option("--output", help="Where the answers to --input go; the same command goes on with it.")
]
MaxRunning = Annotated[int, typer.Option(help="Lines of --input that run at a time.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Add at most so many tokens.", show_default="the model's, else 128")
]
Temperature = Annotated[
    float | None,
    typer.Option(help="Divides the logits; 0 takes the likeliest token.", show_default="the model's, else 0.6"),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Keep the likeliest tokens that reach this probability.", show_default="the model's, else 0.95"),
]
TopK = Annotated[
    int | None, typer.Option(help="Keep so many of the likeliest tokens; 0: all.", show_default="the model's, else 0")
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.", show_default="a new one")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")]
DType = Annotated[str, typer.Option(help="auto (bfloat16 where the files hold 16 bits), float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:<index>.")]
Speculate = Annotated[bool, typer.Option("--speculate", help="Let the MTP modules draft; the text stays the same.")]
Drafts = Annotated[
    int | None,
    typer.Option(help="Tokens to draft a pass; implies --speculate.", show_default="the number of MTP modules"),
]
Bos = Annotated[bool, typer.Option("--bos/--no-bos", help="Whether the prompt starts with the BOS token.")]


def generate(
    model: Model,
    *,
    prompt: Prompt = None,
    input_file: Input = None,
    output_file: Output = None,
    max_running: MaxRunning = 16,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    dtype: DType = "auto",
    device: Device = "cpu",
    bos: Bos = True,
    speculate: Speculate = False,
    drafts: Drafts = None,
) -> None:
    """Continue a prompt with a model: the text to standard output, a summary to standard error.

    The model directory is one of ours, or anybody's in Hugging Face's deepseek_v3 format. Examples:

        abyssal generate runs/demo/model --prompt 'class Stack:'
        abyssal generate runs/demo/model --prompt - --stop 'def ' < main.py
        abyssal generate runs/demo/model --prompt 'import os' --speculate
        abyssal generate runs/demo/model --input prompts.jsonl --output out.jsonl
    """
    from abyssal.cli.batch import BatchCommand
    from abyssal.cli.model_argument import refuse_run_folder
    from abyssal.engine import SamplingParameters, load_model, new_token_limit, speculation_for, stream_text

    asked = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    SamplingParameters(**given)  # type: ignore[arg-type] # refuse a bad option before minutes of loading
    refuse_run_folder(model)
    if input_file is not None or output_file is not None:
        if input_file is None or output_file is None or prompt is not None:
            raise UsageError("--input and --output go together, without --prompt")
        if speculate:
            raise UsageError("--speculate: many lines are drafted for wherever it pays; --drafts 0 makes none")
        return BatchCommand(model, input_file, output_file, given, dtype, device, bos, drafts, max_running).run()
    if prompt is None:
        raise UsageError("give a --prompt, or many with --input and --output; see: abyssal generate --help")
    text = _standard_input() if prompt == "-" else prompt
    loaded = load_model(model, dtype=dtype, device=device)
    speculation = speculation_for(loaded.config, drafts) if speculate or drafts is not None else None
    parameters = _with_defaults(loaded.defaults, given)
    prompt_ids = loaded.encode_prompt(text, bos=bos)
    limit = new_token_limit(loaded.config, len(prompt_ids), parameters.max_new_tokens)
    if limit < parameters.max_new_tokens:
        typer.echo(
            f"note: max_new_tokens={parameters.max_new_tokens}: only {limit} tokens fit behind a prompt of "
            f"{len(prompt_ids)} (max_position_embeddings={loaded.config.max_position_embeddings})",
            err=True,
        )
    times = [time.perf_counter()]
    for chunk in stream_text(loaded, prompt_ids, parameters, speculation):
        typer.echo(chunk.text, nl=False)  # flushes
        times.append(time.perf_counter())
    if sys.stdout.isatty():
        typer.echo(err=True)  # the text need not end its line
    typer.echo(_summary(len(prompt_ids), times, chunk.finish_reason, speculation), err=True)


def _with_defaults(defaults: GenerationDefaults, given: Mapping[str, object]) -> SamplingParameters:
    """Return what was given, with the model's own values for the rest, and say what of those is not followed."""
    from dataclasses import replace

    for note in defaults.notes:
        typer.echo(f"note: {note}", err=True)
    return replace(defaults.parameters, **given)  # type: ignore[arg-type]


def _standard_input() -> str:
    """Return all of standard input, which must be UTF-8."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: byte {error.start} is not UTF-8; convert the text first") from None


def _summary(
    prompt_tokens: int, times: list[float], reason: FinishReason | None, speculation: Speculation | None
) -> str:
    """Return a line on what was generated, and one on its drafts; `times` [s]: the start's, each new token's."""
    new = len(times) - 1
    rate = f" at {(new - 1) / (times[-1] - times[1]):.1f} tokens/s" if new > 1 else ""
    ends = {"eos": "the model's end token", "stop": "a stop string", "length": "its length", None: "nothing"}
    drafts = f"\nspeculation: {speculation}" if speculation else ""
    return (
        f"{prompt_tokens} prompt tokens in {times[1] - times[0]:.2f} s, {new} new tokens{rate}; ended by {ends[reason]}"
        f"{drafts}"
    )
