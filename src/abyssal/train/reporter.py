"""What a person sees of a run, and what metrics.jsonl keeps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from abyssal.config import RunConfig
from abyssal.data.order import Ranges
from abyssal.plan import training_flops
from abyssal.train.evaluation import Score
from abyssal.train.progress import Progress
from abyssal.train.run_folder import RunFolder
from abyssal.train.step import RefusedUpdateError, StepResult

COLUMNS = ("step", "loss", "mtp", "val bpb", "grad", "lr", "MaxVio", "tok/s", "MFU", "left")
WIDTHS = (7, 7, 7, 8, 7, 9, 7, 8, 6, 8)


class Reporter:
    """Prints a line every `every` steps under a progress bar, and writes every step to the metrics."""

    def __init__(
        self,
        console: Console,
        folder: RunFolder,
        begin: Progress,
        config: RunConfig,
        peak_flops: float,
        *,
        speaks: bool = True,
    ) -> None:
        """Report on a run that goes on from `begin`; MFU is stated against `peak_flops`, FLOP/s.

        One of several ranks `speaks`; the others keep the last score only.
        """
        self.console, self.folder, self.peak_flops = console, folder, peak_flops
        self.speaks = speaks
        self.every, self.total_tokens = config.train.log_every_steps, config.train.tokens
        self.flops_per_token = training_flops(config.model, config.train.sequence_length).total
        self.last_score: Score | None = None
        self._since, self._tokens_since, self._apart = time.perf_counter(), begin.tokens, 0.0
        self._rate = 0.0
        self._bar = Bar(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>5.1f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=self.total_tokens, completed=begin.tokens)

    def __enter__(self) -> Self:
        """Print the heading and start the bar."""
        self.console.print(
            "".join(name.rjust(width) for name, width in zip(COLUMNS, WIDTHS, strict=True)), style="bold"
        )
        self._bar.start()
        self._since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        self._bar.stop()

    def step(self, progress: Progress, result: StepResult) -> None:
        """Record one step; `progress` is the one after it."""
        self._bar.update(self._task, completed=progress.tokens)
        due = progress.step % self.every == 0 or progress.step == 1 or progress.tokens >= self.total_tokens
        if due:
            self._measure_rate(progress)
        record = {**progress.to_json(), **asdict(result)}
        load = record.pop("expert_load")
        if due:
            record |= {"tokens_per_s": round(self._rate, 1), "mfu": round(self._mfu, 4)}
            self._print_line(progress, result)
        self._record(record)
        if self.speaks and load:
            self.folder.append_load(progress.step, progress.tokens, load)

    def score(self, progress: Progress, score: Score) -> None:
        """Record a validation; one without documents is none."""
        if not score.bytes:
            return
        self.last_score = score
        self._record(
            {**progress.to_json(), "validation_bits_per_byte": score.bits_per_byte, "validation_loss": score.loss}
        )

    def average_score(self, progress: Progress, score: Score) -> None:
        """Record the validation of the averaged weights."""
        if not score.bytes:
            return
        self._record({**progress.to_json(), "validation_ema_bits_per_byte": score.bits_per_byte})
        self._say(f"validation of the averaged weights: {score.bits_per_byte:.4f} bits per byte", style=None)

    def refused(self, progress: Progress, ranges: Ranges, refused: RefusedUpdateError) -> None:
        """Record a refused batch under the number of the step that it was drawn for."""
        seen = {"loss": refused.loss, "gradient_norm": refused.gradient_norm}
        record = {
            "refused": refused.reason,
            **{f"refused_{name}": value if math.isfinite(value) else None for name, value in seen.items()},
            "refused_sequences": ranges,
        }
        self._record({**progress.to_json(), "step": progress.step + 1, **record})
        self._say(f"step {progress.step + 1}: {refused}; skipped: sequences {_shown(ranges)}")

    def rolled_back(self, progress: Progress, from_step: int, skipped: Ranges) -> None:
        """Cut off the metrics of the steps after `progress`, which are made anew, and record the rollback."""
        if self.speaks:
            self.folder.cut_records(progress.step)
        record = {"rolled_back_from": from_step, "skipped": skipped}
        self._record({**progress.to_json(), "step": progress.step + 1, **record})
        self._say(f"back from step {from_step} to step {progress.step}; skipped: sequences {_shown(skipped)}")
        self._bar.update(self._task, completed=progress.tokens)
        self._since, self._tokens_since, self._apart = time.perf_counter(), progress.tokens, 0.0

    def _record(self, record: dict[str, Any]) -> None:
        if self.speaks:
            self.folder.append_metrics(record)

    def _say(self, sentence: str, style: str | None = "yellow") -> None:
        self.console.print(sentence, style=style, highlight=False, markup=False)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave what happens inside out of the training rate."""
        begin = time.perf_counter()
        yield
        self._apart += time.perf_counter() - begin

    @property
    def _mfu(self) -> float:
        return self._rate * self.flops_per_token / self.peak_flops

    def _measure_rate(self, progress: Progress) -> None:
        now = time.perf_counter()
        elapsed = now - self._since - self._apart
        self._rate = (progress.tokens - self._tokens_since) / max(elapsed, 1e-9)
        self._since, self._tokens_since, self._apart = now, progress.tokens, 0.0

    def _print_line(self, progress: Progress, result: StepResult) -> None:
        left = max(self.total_tokens - progress.tokens, 0) / max(self._rate, 1e-9)
        minutes, seconds = divmod(round(left), 60)
        cells = (
            f"{progress.step}",
            f"{result.loss:.3f}",
            f"{result.mtp_losses[0]:.3f}" if result.mtp_losses else "-",
            f"{self.last_score.bits_per_byte:.3f}" if self.last_score else "-",
            f"{result.gradient_norm:.2f}",
            f"{result.learning_rate:.1e}",
            f"{result.max_violation:.2f}",
            f"{self._rate:,.0f}",
            f"{self._mfu:.1%}",
            f"{minutes}:{seconds:02d}",
        )
        self._print_row(cells)

    def _print_row(self, cells: tuple[str, ...], style: str | None = None) -> None:
        row = "".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))
        self.console.print(row, style=style, highlight=False)


def _shown(ranges: Ranges) -> str:
    """Return ranges for people, first and last included."""
    return ", ".join(f"{start} to {stop - 1}" for start, stop in ranges)
