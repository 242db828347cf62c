"""`abyssal generate --input ... --output ...`: every line of a file, on the serving engine, resumable."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from abyssal.errors import DataError, UsageError

if TYPE_CHECKING:
    from abyssal.engine import EngineOptions, EngineStatistics, LoadedModel, Request
    from abyssal.engine.batch_input import BatchInput, BatchLine
    from abyssal.engine.batch_output import BatchOutput


@dataclass(frozen=True)
class BatchCommand:
    """What the command line asks for."""

    model: Path
    input_file: Path
    output_file: Path
    given: Mapping[str, object]  # sampling parameters
    dtype: str
    device: str
    threads: int | None
    bos: bool
    drafts: int | None
    running: int

    def run(self) -> None:
        """BatchResult every line of the input that the output does not answer yet.

        Raises:
            AbyssalError: a file, a line or the model; at the end where lines were answered with an error.
        """
        from abyssal.engine import EngineOptions
        from abyssal.engine.batch import model_digest
        from abyssal.engine.batch_input import BatchInput
        from abyssal.engine.batch_output import BatchOutput

        options = EngineOptions(
            max_step_tokens=max(256, self.running), max_running=self.running, num_drafts=self.drafts
        )
        settled = {"model": model_digest(self.model), "dtype": self.dtype, "bos": self.bos, **self.given}
        batch = BatchInput(self.input_file, json.dumps(settled, sort_keys=True))
        lines = batch.check()
        if self.output_file.exists() and self.output_file.samefile(self.input_file):
            raise UsageError(f"--output {self.output_file}: is the input; choose another file")
        with BatchOutput(self.output_file) as output:
            output.check(lines)
            known = set(output.keys)
            if known:
                typer.echo(f"{self.output_file}: {len(known)} of {len(lines)} lines are answered already", err=True)
            if len(known) < len(lines):
                todo = [line for line in lines if line.number not in known]
                self._answer(batch, output, todo, options)
            output.sort()
            if output.errors:
                number, sentence = min(output.errors.items())
                raise DataError(
                    f"{self.output_file}: {len(output.errors)} of {len(lines)} lines have an error in place of a text; "
                    f"the first is line {number}: {sentence}"
                )

    def _answer(self, batch: BatchInput, output: BatchOutput, todo: list[BatchLine], options: EngineOptions) -> None:
        """Load the model, answer the lines to do, and print a summary."""
        from abyssal.engine import Engine, load_model
        from abyssal.engine.batch import run_batch

        request_of = self._asking(chats=any(line.messages is not None for line in todo))
        loaded = load_model(self.model, dtype=self.dtype, device=self.device, threads=self.threads)
        for note in loaded.defaults.notes:
            typer.echo(f"note: {note}", err=True)
        engine = Engine.of(loaded, options)
        numbers = {line.number for line in todo}
        began = time.perf_counter()
        with _progress(len(todo)) as (count_tokens, count_line):
            lines = (line for line in batch if line.number in numbers)
            for answer in run_batch(engine, lines, lambda line: request_of(loaded, line), count_tokens):
                output.write(answer.line, answer.record())
                count_line()
        typer.echo(_summary(len(todo), time.perf_counter() - began, engine.statistics()), err=True)

    def _asking(self, *, chats: bool) -> Callable[[LoadedModel, BatchLine], Request]:
        """Return what makes a request of a line; reads the chat template if there are `chats`."""
        from abyssal.text.chat_template import ChatTemplate

        template = ChatTemplate.load(self.model) if chats else None

        def request_of(loaded: LoadedModel, line: BatchLine) -> Request:
            defaults = replace(loaded.defaults.parameters, **self.given)  # type: ignore[arg-type]
            return line.request(loaded, template, defaults, bos=self.bos)

        return request_of


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """Show lines done, tokens a second and the time left on a terminal; yield what counts tokens and lines."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("lines, {task.fields[rate]} tokens/s, left"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    tokens, began = 0, time.perf_counter()
    with bar:
        task = bar.add_task("", total=total, rate="–")

        def count_tokens(new: int) -> None:
            nonlocal tokens
            tokens += new
            bar.update(task, rate=f"{tokens / (time.perf_counter() - began):,.0f}")

        yield count_tokens, lambda: bar.advance(task)


def _summary(lines: int, seconds: float, statistics: EngineStatistics) -> str:
    """Return a line on what was generated, and one on its drafts."""
    tokens = statistics.new_tokens_total
    text = (
        f"{lines} lines in {seconds:.1f} s: {tokens:,} new tokens at {tokens / seconds:,.1f} tokens/s; "
        f"{statistics.shared_tokens_total:,} of {statistics.prompt_tokens_total:,} prompt tokens were shared"
    )
    drafted, accepted = sum(statistics.drafted), sum(statistics.accepted)
    return f"{text}\nspeculation: {accepted} of {drafted} drafts accepted" if drafted else text
