"""Averaged weights, exports on the way, states kept for good, and what a resumed run may change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from abyssal.checkpoint.state import latest_state, states
from abyssal.config import RunConfig, load_recipe
from abyssal.errors import CheckpointError, UsageError
from abyssal.train import loop, resolve
from abyssal.train.run_folder import RunFolder
from abyssal.train.training_state import TrainingState

SILENT = Console(quiet=True)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def cut(recipe: RunConfig, run: Path, monkeypatch: pytest.MonkeyPatch, call: int = 8) -> None:
    """Make a run that is interrupted in the step with this number."""
    step, calls = loop.train_step, 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.start(recipe, run, SILENT)


@pytest.mark.slow
def test_average_of_the_weights_is_saved_scored_and_exported_and_resumes_to_the_bit(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(str(small_recipe), ["ema.decay=0.8"])
    loop.start(recipe, tmp_path / "whole", SILENT)
    cut(recipe, tmp_path / "cut", monkeypatch)
    loop.resume(tmp_path / "cut", SILENT)
    models = [
        [load_file(tmp_path / run / name / "model.safetensors") for name in ("model", "model-ema")]
        for run in ("whole", "cut")
    ]
    for whole, resumed in zip(*models, strict=True):
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    state = TrainingState(recipe, torch.device("cpu"))
    state.restore(latest_state(tmp_path / "whole" / "checkpoints"))
    assert state.average is not None
    model, average = models[0]
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.1.mlp.gate.e_score_correction_bias"):
        assert torch.equal(average[name], state.average.tensors[name])
        assert not torch.equal(average[name], model[name])
    (score,) = [r for r in metrics(tmp_path / "whole") if "validation_ema_bits_per_byte" in r]
    last = metrics(tmp_path / "whole")[-2]
    assert score["validation_ema_bits_per_byte"] != last["validation_bits_per_byte"]


def test_model_is_exported_on_the_way_and_states_stay_for_good(small_recipe: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        str(small_recipe), ["checkpoint.export_every_steps=5", "checkpoint.keep_every=2", "checkpoint.keep=1"]
    )
    loop.start(recipe, tmp_path / "run", SILENT)
    exports = tmp_path / "run" / "exports"
    assert sorted(path.name for path in exports.iterdir()) == ["step-00000005", "step-00000010"]
    assert (exports / "step-00000005" / "config.json").is_file()
    kept = [path.name for path in states(tmp_path / "run" / "checkpoints")]
    assert kept == ["step-00000006", "step-00000012"]


def test_resumed_run_takes_what_may_change_says_it_and_keeps_it(
    small_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(small_run, tmp_path / "run", monkeypatch)
    loop.resume(tmp_path / "run", Console(width=200), ["checkpoint.every_steps=4", "evaluation.max_bytes=50"])
    said = capsys.readouterr().out
    assert "checkpoint.every_steps: 4 from here on, was 3\n" in said
    assert "evaluation.max_bytes: 50 from here on, was 100000\n" in said
    assert [p.name for p in states(tmp_path / "run" / "checkpoints")] == ["step-00000008", "step-00000012"]
    loop.resume(tmp_path / "run", Console(width=200))
    assert "from here on" not in capsys.readouterr().out


@pytest.mark.slow
def test_threads_may_change_with_a_warning(
    small_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(small_run, tmp_path / "run", monkeypatch)
    loop.resume(tmp_path / "run", Console(width=200), ["train.threads=2"])
    assert "train.threads: 2 from here on, was 1; losses may differ" in capsys.readouterr().out


def test_other_changes_are_refused_with_the_difference(
    small_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    cut(small_run, run, monkeypatch)
    stored = (run / "recipe.toml").read_text()
    sentence = r"--set seed=5: a resumed run keeps .*: seed=5 \(was 0\); only checkpoint, .* may change"
    with pytest.raises(UsageError, match=sentence):
        loop.resume(run, SILENT, ["seed=5"])
    assert (run / "recipe.toml").read_text() == stored
    (run / "recipe.toml").write_text(stored.replace("hidden_size = 24", "hidden_size = 28"))
    with pytest.raises(UsageError, match=r"recipe\.toml: a resumed run keeps .*hidden_size=28 \(was 24\)"):
        loop.resume(run, SILENT)


def test_flipped_bit_in_the_only_state_is_named_with_the_way_out(
    small_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(small_run, tmp_path / "run", monkeypatch, call=5)
    part = tmp_path / "run" / "checkpoints" / "step-00000003" / "__0_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 3] ^= 16
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: damaged .*; remove step-00000003, and the run begins"):
        loop.resume(tmp_path / "run", SILENT)


@pytest.mark.parametrize("threads", [0, 1])
def test_threads_may_be_left_to_the_machine_again(
    small_run: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    threads: int,
) -> None:
    monkeypatch.setattr(resolve, "available_cores", lambda: 1)
    cut(small_run, tmp_path / "run", monkeypatch)
    loop.resume(tmp_path / "run", Console(width=200), [f"train.threads={threads}"])
    assert ("threads: 1\n" in capsys.readouterr().out) == (threads == 0)
    assert RunFolder(tmp_path / "run").resolved_config().train.threads == 1


def damage(state: Path) -> None:
    part = state / "__0_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 3] ^= 16
    part.write_bytes(content)


def test_damaged_newest_state_is_stepped_over_when_asked(
    small_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    loop.start(small_run, run, SILENT)
    whole = [r for r in metrics(run) if "loss" in r]
    damage(run / "checkpoints" / "step-00000012")
    with pytest.raises(CheckpointError, match=r"damaged .*; resume with --step-back to set step-00000012 aside and go"):
        loop.resume(run, SILENT)
    assert [path.name for path in states(run / "checkpoints")] == ["step-00000009", "step-00000012"]
    loop.resume(run, Console(width=500), step_back=True)
    said = (
        "(its sha256 is not the one written with it); set aside as damaged-step-00000012, and the run goes back to the"
    )
    assert said in capsys.readouterr().out
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["damaged-step-00000012", "step-00000009", "step-00000012"]
    timed = ("tokens_per_s", "mfu")
    again, whole = (
        [{name: value for name, value in r.items() if name not in timed} for r in records]
        for records in ([r for r in metrics(run) if "loss" in r], whole)
    )
    assert again == whole
    loop.resume(run, Console(width=500), step_back=True)  # a sound one stays
    assert "set aside" not in capsys.readouterr().out


def test_the_only_state_is_never_stepped_over(
    small_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(small_run, tmp_path / "run", monkeypatch, call=5)
    damage(tmp_path / "run" / "checkpoints" / "step-00000003")
    with pytest.raises(CheckpointError, match="no state before step-00000003 is intact"):
        loop.resume(tmp_path / "run", SILENT, step_back=True)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
