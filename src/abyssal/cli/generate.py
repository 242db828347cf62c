"""`abyssal generate`: continue a prompt with a model directory, fill the gap before a suffix, or answer a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abyssal.cli.generation import (
    Printing,
    end_line_on_terminal,
    given_sampling,
    num_drafts,
    sampling_of,
    utf8,
)
from abyssal.cli.generation_options import (
    Device,
    Drafts,
    DType,
    Model,
    Speculate,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
)
from abyssal.errors import UsageError

if TYPE_CHECKING:
    from abyssal.engine import LoadedModel, SamplingParameters

Prompt = Annotated[str | None, typer.Option(help="Text to continue; - reads it from standard input.")]
Suffix = Annotated[
    str | None, typer.Option(help="Text behind the gap: write what belongs between the prompt and it (PSM).")
]
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
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.", show_default="a new one")]
Bos = Annotated[bool, typer.Option("--bos/--no-bos", help="Whether the prompt starts with the BOS token.")]


def generate(
    model: Model,
    *,
    prompt: Prompt = None,
    suffix: Suffix = None,
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
    threads: Threads = None,
    bos: Bos = True,
    speculate: Speculate = False,
    drafts: Drafts = None,
) -> None:
    """Continue a prompt with a model: the text to standard output, a summary to standard error.

    The model directory is one of ours, or anybody's in Hugging Face's deepseek_v3 format. Examples:

        abyssal generate runs/demo/model --prompt 'class Stack:'
        abyssal generate runs/demo/model --prompt - --stop 'def ' < main.py
        abyssal generate runs/demo/model --prompt 'import os' --speculate
        abyssal generate runs/demo/model --prompt 'def area(r):' --suffix 'return a'
        abyssal generate runs/demo/model --input prompts.jsonl --output out.jsonl
    """
    from abyssal.cli.batch import BatchCommand
    from abyssal.cli.model_argument import refuse_run_folder
    from abyssal.engine import Engine, EngineOptions, Request, load_model

    given = given_sampling(
        stop, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    refuse_run_folder(model)
    if input_file is not None or output_file is not None:
        if input_file is None or output_file is None or prompt is not None or suffix is not None:
            raise UsageError("--input and --output go together, without --prompt and --suffix")
        if speculate:
            raise UsageError("--speculate: many lines are drafted for wherever it pays; --drafts 0 makes none")
        return BatchCommand(
            model, input_file, output_file, given, dtype, device, threads, bos, drafts, max_running
        ).run()
    if prompt is None:
        raise UsageError("give a --prompt, or many with --input and --output; see: abyssal generate --help")
    text = utf8(sys.stdin.buffer.read()) if prompt == "-" else prompt
    loaded = load_model(model, dtype=dtype, device=device, threads=threads)
    drafts = num_drafts(loaded, speculate, drafts)
    parameters = sampling_of(loaded, given)
    prompt_ids = loaded.encode_prompt(text, bos=bos) if suffix is None else loaded.encode_gap(text, suffix, bos=bos)
    limit = _limit(loaded, len(prompt_ids), parameters)
    engine = Engine.of(loaded, EngineOptions.single_stream(drafts, max_sequence_tokens=len(prompt_ids) + limit))
    printing = Printing(len(prompt_ids))
    printing.show(engine.stream(Request(prompt_ids, parameters)))
    end_line_on_terminal()
    typer.echo(printing.summary(engine.draft_statistics if drafts else None), err=True)


def _limit(loaded: LoadedModel, prompt_tokens: int, parameters: SamplingParameters) -> int:
    """Return how many tokens can follow the prompt, and say so where these are fewer than asked for.

    Raises:
        UsageError: none fits.
    """
    from abyssal.engine import new_token_limit

    limit = new_token_limit(loaded.config, prompt_tokens, parameters.max_new_tokens)
    if limit < parameters.max_new_tokens:
        typer.echo(
            f"note: max_new_tokens={parameters.max_new_tokens}: only {limit} tokens fit behind a prompt of "
            f"{prompt_tokens} (max_position_embeddings={loaded.config.max_position_embeddings})",
            err=True,
        )
    return limit
