"""What the commands that let a model write share: options to parameters, text to the terminal, a summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import typer

from abyssal.errors import DataError, UsageError

if TYPE_CHECKING:
    from abyssal.engine import DraftStatistics, FinishReason, LoadedModel, Output, SamplingParameters


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


def num_drafts(loaded: LoadedModel, speculate: bool, drafts: int | None) -> int:
    """Return how many tokens to draft for a pass: none unless asked for, by default one for each MTP module.

    Raises:
        UsageError: the model cannot draft, or not so few tokens.
    """
    if not speculate and drafts is None:
        return 0
    modules = loaded.config.num_nextn_predict_layers
    if not modules:
        raise UsageError(
            "speculate: drafts come from MTP modules, and this model has none "
            "(num_nextn_predict_layers=0, or its files leave them out); generate without"
        )
    if drafts is not None and drafts < 1:
        raise UsageError(f"drafts={drafts}: must be at least 1; each is one token, proposed in advance")
    return modules if drafts is None else drafts


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
    reason: FinishReason | Literal["error"] | None = None
    times: list[float] = field(default_factory=lambda: [time.perf_counter()])

    def show(self, outputs: Iterator[Output]) -> None:
        """Print the text of the outputs as they come."""
        for output in outputs:
            typer.echo(output.text, nl=False)  # flushes
            self.times.append(time.perf_counter())
            self.reason = output.finish_reason

    @property
    def new_tokens(self) -> int:
        """Tokens that came."""
        return len(self.times) - 1

    def summary(self, drafts: DraftStatistics | None) -> str:
        """Return a line on what was generated, and one on its drafts."""
        reused = f" ({self.reused_tokens} of them known)" if self.reused_tokens else ""
        line = f"{self.prompt_tokens} prompt tokens{reused}"
        if self.new_tokens:
            line += f" in {self.times[1] - self.times[0]:.2f} s"
        rate = ""
        if self.new_tokens > 1:
            rate = f" at {(self.new_tokens - 1) / (self.times[-1] - self.times[1]):.1f} tokens/s"
        ends = {"eos": "the model's end token", "stop": "a stop string", "length": "its length", None: "Ctrl-C"}
        speculation = f"\nspeculation: {drafts}" if drafts else ""
        return f"{line}, {self.new_tokens} new tokens{rate}; ended by {ends[self.reason]}{speculation}"


def end_line_on_terminal() -> None:
    """End the line of a text that need not do so itself, where a person reads it."""
    if sys.stdout.isatty():
        typer.echo(err=True)
