"""Bad batches in a whole run: it ends as the run that never saw them, to the bit."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from abyssal.checkpoint.state import latest_state, read_progress, states
from abyssal.config import RunConfig
from abyssal.data.batch import Batch, BatchLoader
from abyssal.data.order import Ranges, merged
from abyssal.errors import TrainingError
from abyssal.train import loop
from abyssal.train.guard import Guard
from abyssal.train.training_state import TrainingState

pytestmark = pytest.mark.slow

SILENT = Console(quiet=True)
SIZE = 4  # sequences a step
Poison = Mapping[int, float]  # number of a batch -> what its gradients are multiplied with


@pytest.fixture
def config(small_run: RunConfig) -> RunConfig:
    """24 steps, a state every 5, far outliers refused after 4 accepted ones."""
    values = small_run.model_dump()
    values["train"]["tokens"] = 24 * SIZE * 32
    values["checkpoint"] |= {"every_steps": 5, "keep": 2}
    values["evaluation"]["every_steps"] = 1000
    values["guard"] = {"sigmas": 100.0, "min_steps": 4, "rollback_steps": 6, "max_rollbacks": 2}
    return RunConfig.parse(values, "test")


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[Any, ...]]:
    return [(r["step"], r["loss"], *r["mtp_losses"], r["gradient_norm"]) for r in metrics(run) if "loss" in r]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def of_batches(*numbers: int) -> Ranges:
    return merged(sorted((SIZE * n, SIZE * (n + 1)) for n in numbers))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[Poison], None]:
    """Let a batch spoil its gradients, whenever it is drawn."""

    def inject(poisoned: Poison) -> None:
        batch, step = BatchLoader.batch, monkeypatch_step
        drawn: list[Batch] = []

        def draw(self: BatchLoader, first: int, size: int, share: tuple[int, int]) -> Batch:
            drawn[:] = [batch(self, first, size, share)]
            return drawn[0]

        def spoiled_step(model: Any, *arguments: Any, **options: Any) -> Any:
            factor = poisoned.get(drawn[0].ranges[0][0] // SIZE, 1.0)
            hook = model.lm_head.weight.register_hook(lambda grad: grad * factor)
            try:
                return step(model, *arguments, **options)
            finally:
                hook.remove()

        monkeypatch.setattr(BatchLoader, "batch", draw)
        monkeypatch.setattr(loop, "train_step", spoiled_step)

    monkeypatch_step = loop.train_step
    return inject


@pytest.fixture
def never_saw(monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> Callable[[Path, Ranges], None]:
    """Make a run whose data order leaves ranges out from its beginning."""

    def run(path: Path, skipped: Ranges) -> None:
        build = TrainingState.__init__

        def with_skipped(self: TrainingState, *arguments: Any) -> None:
            build(self, *arguments)
            self.guard = Guard(skipped=skipped)

        with monkeypatch.context() as patch:
            patch.setattr(TrainingState, "__init__", with_skipped)
            loop.start(config, path, SILENT)

    return run


def test_single_bad_batches_are_as_if_never_drawn(
    config: RunConfig, tmp_path: Path, poison: Callable[..., None], never_saw: Callable[..., None]
) -> None:
    # the refused update leaves no trace in weights, moments, biases and counts, so "within noise" is: to the bit
    numbers = [random.randint(5, 7), random.randint(14, 16), random.randint(22, 24)]
    bad = dict(zip(numbers, random.sample([math.nan, 1e6, math.inf], 3), strict=True))
    never_saw(tmp_path / "never", of_batches(*bad))
    poison(bad)
    loop.start(config, tmp_path / "run", SILENT)
    assert losses(tmp_path / "run") == losses(tmp_path / "never"), bad
    assert weights(tmp_path / "run") == weights(tmp_path / "never"), bad
    last = read_progress(latest_state(tmp_path / "run" / "checkpoints"))
    assert merged(map(tuple, last["guard"]["skipped"])) == of_batches(*bad)
    assert (last["step"], last["sequences"]) == (24, 24 * SIZE)
    refused = [r for r in metrics(tmp_path / "run") if "refused" in r]
    assert merged(sorted((a, b) for r in refused for a, b in r["refused_sequences"])) == of_batches(*bad)
    for record, factor in zip(refused, bad.values(), strict=True):
        assert (record["refused_gradient_norm"] is None) == (not math.isfinite(factor)), record
        assert "gradient norm is" in record["refused"]


def test_text_unlike_all_before_is_refused_by_its_loss(config: RunConfig, tmp_path: Path) -> None:
    values = config.model_dump()
    values["train"]["tokens"] = 50 * SIZE * 32
    values["schedule"]["learning_rate"] = {"start": 1e-2}
    values["guard"] |= {"sigmas": 10.0, "window_steps": 12, "min_steps": 12}
    draw = BatchLoader.batch

    def foreign(self: BatchLoader, first: int, size: int, share: tuple[int, int]) -> Batch:
        batch = draw(self, first, size, share)
        noise = torch.randint(300, batch.tokens.shape, generator=torch.Generator().manual_seed(1))
        return Batch(noise, first, batch.ranges) if batch.ranges == of_batches(44) else batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchLoader, "batch", foreign)
        loop.start(RunConfig.parse(values, "test"), tmp_path / "run", SILENT)
    refused = [r for r in metrics(tmp_path / "run") if "refused" in r]
    assert [r["refused_sequences"] for r in refused] == [[list(r) for r in of_batches(44)]]
    assert refused[0]["refused"].startswith("the loss is ")


def test_repeated_trouble_goes_back_and_steps_over_the_whole_range(
    config: RunConfig, tmp_path: Path, poison: Callable[..., None], never_saw: Callable[..., None]
) -> None:
    never_saw(tmp_path / "never", of_batches(13, 14, 15, 16))
    poison({13: math.nan, 14: math.nan, 16: 1e6})  # 15 is accepted at first, between them: suspect
    loop.start(config, tmp_path / "run", SILENT)
    assert losses(tmp_path / "run") == losses(tmp_path / "never")
    assert weights(tmp_path / "run") == weights(tmp_path / "never")
    (rollback,) = [r for r in metrics(tmp_path / "run") if "rolled_back_from" in r]
    assert (rollback["step"], rollback["rolled_back_from"]) == (11, 14)
    assert rollback["skipped"] == [list(r) for r in of_batches(13, 14, 15, 16)]
    assert not [r for r in metrics(tmp_path / "run") if "refused" in r]  # they belong to steps that were cut off


def test_trouble_before_the_first_state_goes_back_to_the_beginning(
    config: RunConfig, tmp_path: Path, poison: Callable[..., None], never_saw: Callable[..., None]
) -> None:
    never_saw(tmp_path / "never", of_batches(1, 2, 3))
    poison(dict.fromkeys((1, 2, 3), math.nan))
    loop.start(config, tmp_path / "run", SILENT)
    assert weights(tmp_path / "run") == weights(tmp_path / "never")


def test_trouble_across_a_state_goes_back_behind_it(
    config: RunConfig, tmp_path: Path, poison: Callable[..., None], never_saw: Callable[..., None]
) -> None:
    never_saw(tmp_path / "never", of_batches(*range(8, 14)))
    poison(dict.fromkeys((8, 12, 13), math.nan))  # the states of steps 5 and 10 stand when the third is refused
    loop.start(config, tmp_path / "run", SILENT)
    assert weights(tmp_path / "run") == weights(tmp_path / "never")
    assert [p.name for p in states(tmp_path / "run" / "checkpoints")] == ["step-00000020", "step-00000024"]


def test_trouble_without_end_ends_the_run_and_says_what_was_seen(
    config: RunConfig, tmp_path: Path, poison: Callable[..., None]
) -> None:
    poison(dict.fromkeys(range(12, 100), math.nan))
    sentence = r"step 11: the gradient norm is nan.*not applied; 3 batches .* went back 2 times already"
    with pytest.raises(TrainingError, match=sentence):
        loop.start(config, tmp_path / "run", SILENT)
    rollbacks = [r for r in metrics(tmp_path / "run") if "rolled_back_from" in r]
    assert [r["skipped"] for r in rollbacks][-1] == [list(r) for r in of_batches(*range(10, 18))]
    assert latest_state(tmp_path / "run" / "checkpoints").name == "step-00000010"


def test_run_interrupted_amid_trouble_takes_the_same_decisions(
    config: RunConfig, tmp_path: Path, poison: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison({7: 1e6, 12: math.nan, 13: math.nan, 15: 1e6, 20: math.inf})
    loop.start(config, tmp_path / "whole", SILENT)
    step, stop_at, calls = loop.train_step, random.randint(6, 30), 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.start(config, tmp_path / "cut", SILENT)
    loop.resume(tmp_path / "cut", SILENT)
    runs = [tmp_path / "cut", tmp_path / "whole"]
    assert losses(runs[0]) == losses(runs[1]), stop_at
    assert weights(runs[0]) == weights(runs[1]), stop_at
    seen = [[r for r in metrics(run) if "refused" in r or "rolled_back_from" in r] for run in runs]
    assert seen[0] == seen[1], stop_at
