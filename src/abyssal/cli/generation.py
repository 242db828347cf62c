"""What the commands that let a model write share: options to parameters, text to the terminal, a summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import typer

from abyssal.errors import DataError

if TYPE_CHECKING:
    from abyssal.engine import Chunk, FinishReason, LoadedModel, SamplingParameters, Speculation


def given_sampling(stop: Sequence[str] | None, **asked: object) -> dict[str, object]:
    """Return the sampling parameters that were given on the command line.

    Raises:
        UsageError: one of them cannot be; said before minutes of loading.
    """
    from abyssal.engine import SamplingParameters

    asked["stop"] = tuple(stop) if stop else None
    given = {name: value for name, value in asked.items() if value is not None}
    SamplingParameters(**given)  # type: ignore[arg-type]
    return given


def sampling_of(loaded: LoadedModel, given: Mapping[str, object]) -> SamplingParameters:
    """Return what was given, with the model's own values for the rest, and say what of those is not followed."""
    for note in loaded.defaults.notes:
        typer.echo(f"note: {note}", err=True)
    return replace(loaded.defaults.parameters, **given)  # type: ignore[arg-type]


def asked_speculation(loaded: LoadedModel, speculate: bool, drafts: int | None) -> Speculation | None:
    """Return how to draft, if that was asked for.

    Raises:
        UsageError: the model cannot draft, or not so few tokens.
    """
    from abyssal.engine import speculation_for

    return speculation_for(loaded.config, drafts) if speculate or drafts is not None else None


def utf8(data: bytes) -> str:
    """Return the text of bytes from standard input.

    Raises:
        DataError: they are not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: byte {error.start} is not UTF-8; convert the text first") from None


@dataclass
class Printing:
    """The text of a model on its way to standard output, with the time of each token."""

    prompt_tokens: int
    reused_tokens: int = 0
    reason: FinishReason | None = None
    times: list[float] = field(default_factory=lambda: [time.perf_counter()])

    def show(self, chunks: Iterator[Chunk]) -> None:
        """Print the chunks as they come."""
        for chunk in chunks:
            typer.echo(chunk.text, nl=False)  # flushes
            self.times.append(time.perf_counter())
            self.reason = chunk.finish_reason

    @property
    def new_tokens(self) -> int:
        """Tokens that came."""
        return len(self.times) - 1

    def summary(self, speculation: Speculation | None) -> str:
        """Return a line on what was generated, and one on its drafts."""
        reused = f" ({self.reused_tokens} of them known)" if self.reused_tokens else ""
        line = f"{self.prompt_tokens} prompt tokens{reused}"
        if self.new_tokens:
            line += f" in {self.times[1] - self.times[0]:.2f} s"
        rate = ""
        if self.new_tokens > 1:
            rate = f" at {(self.new_tokens - 1) / (self.times[-1] - self.times[1]):.1f} tokens/s"
        ends = {"eos": "the model's end token", "stop": "a stop string", "length": "its length", None: "Ctrl-C"}
        drafts = f"\nspeculation: {speculation}" if speculation else ""
        return f"{line}, {self.new_tokens} new tokens{rate}; ended by {ends[self.reason]}{drafts}"


def end_line_on_terminal() -> None:
    """End the line of a text that need not do so itself, where a person reads it."""
    if sys.stdout.isatty():
        typer.echo(err=True)
