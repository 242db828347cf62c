"""Metrics are read as far as they go; what is left out is said."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abyssal.report.metrics import RunMetrics, read_metrics

WriteRun = Callable[..., Path]
StepRecord = Callable[..., dict[str, Any]]


def read(folder: Path) -> RunMetrics:
    return read_metrics(folder / "metrics.jsonl")


def test_fields_become_curves_over_steps_and_tokens(write_run: WriteRun, step_record: StepRecord) -> None:
    score = {"step": 2, "tokens": 256, "validation_bits_per_byte": 1.5, "validation_loss": 4.0}
    metrics = read(write_run("a", [step_record(1), step_record(2, mtp_losses=[5.0, 5.5]), score]))
    assert (metrics.steps, metrics.tokens, metrics.notes) == (2, 256.0, ())
    assert metrics.curves["loss"].along("tokens").tolist() == [128, 256]
    assert metrics.curves["mtp_losses.2"].along("steps").tolist() == [2]
    assert metrics.last("validation_bits_per_byte") == 1.5
    assert metrics.last("gone") is None
    assert len(metrics.loads) == 2


def test_rates_are_weighed_by_what_they_cover(write_run: WriteRun) -> None:
    records = [
        {"step": 1, "tokens": 100, "tokens_per_s": 10.0, "mfu": 0.1},
        {"step": 4, "tokens": 400, "tokens_per_s": 30.0, "mfu": 0.3},
    ]
    metrics = read(write_run("a", records))
    assert metrics.training_time_s() == pytest.approx(20.0)
    assert metrics.tokens_timed() == 400
    assert metrics.mean_mfu() == pytest.approx((0.1 * 100 + 0.3 * 300) / 400)


def test_line_that_was_cut_short_is_left_out_and_noted(write_run: WriteRun) -> None:
    folder = write_run("a")
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole[:-40])
    metrics = read(folder)
    assert metrics.steps == 11
    assert metrics.notes == ("1 line of metrics.jsonl could not be read and is left out.",)


@pytest.mark.parametrize(
    "line", ["{", "7", "null", '{"loss": 3}', '{"step": "x"}', '{"step": Infinity}', "[" * 100_000]
)
def test_line_that_is_no_record_is_left_out(line: str, write_run: WriteRun) -> None:
    folder = write_run("a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    metrics = read(folder)
    assert metrics.steps == 12
    assert metrics.notes == ("1 line of metrics.jsonl could not be read and is left out.",)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "3.5", True, [1], 10**400])
def test_value_that_is_no_finite_number_is_a_gap(value: Any, write_run: WriteRun, step_record: StepRecord) -> None:
    metrics = read(write_run("a", [step_record(1, loss=2.0), step_record(2, loss=value)]))
    assert metrics.last("loss") == 2.0
    assert np.isnan(metrics.curves["loss"].values).tolist() == [False, True]


def test_fields_that_an_older_run_did_not_write_are_named(write_run: WriteRun) -> None:
    metrics = read(write_run("a", [{"step": 1, "loss": 3.0, "gradient_norm": 1.0}]))
    assert metrics.notes == ("Not in metrics.jsonl, so not shown: balance_loss, learning_rate, max_violation, tokens.",)


@pytest.mark.parametrize("kind", ["skipped", "refused", "rolled_back_from"])
def test_skipped_batches_are_kept_out_of_the_curves(kind: str, write_run: WriteRun, step_record: StepRecord) -> None:
    skipped = step_record(3, **{kind: [64, 96]}, loss=900.0, reason="gradient norm")
    metrics = read(write_run("a", [step_record(1), step_record(2), skipped]))
    assert len(metrics.curves["loss"]) == 2
    assert metrics.steps == 2
    (batch,) = metrics.skipped
    assert (batch.step, batch.place("tokens")) == (3, 384.0)
    assert (kind.replace("_", " "), "[64, 96]") in batch.facts
    assert ("reason", "gradient norm") in batch.facts


def test_metrics_that_are_not_there_or_empty_are_a_sentence(tmp_path: Path, write_run: WriteRun) -> None:
    assert read(tmp_path).notes == ("There is no metrics.jsonl yet.",)
    assert read(write_run("a", [])).notes == ("metrics.jsonl holds no step yet.",)
