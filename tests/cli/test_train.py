"""`abyssal train`: a recipe becomes a model directory; every fault is one sentence with its exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abyssal.config import RunConfig
from abyssal.train import loop
from abyssal.train.run_folder import RunFolder

Call = Callable[..., Any]


def steps(run: Path) -> list[int]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in records if "loss" in record]


def interrupt(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Let the call with this number of a function of the loop meet a Ctrl-C."""
    original, calls = getattr(loop, name), 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(loop, name, interrupted)


def test_recipe_file_becomes_a_model_that_the_printed_command_continues(abyssal: Call, small_recipe: Path) -> None:
    result = abyssal("train", small_recipe)
    assert (result.code, result.err) == (0, "")
    assert "\nmodel directory: runs/small/model\n" in result.out
    assert steps(Path("runs/small")) == list(range(1, 13))
    heading, *rows = [line.split() for line in result.out.splitlines() if line.startswith("  ")]
    assert heading[:4] == ["step", "loss", "mtp", "val"]
    assert [row[0] for row in rows] == ["1", "2", "4", "6", "8", "10", "12"]

    command = result.command("try it: ")
    assert command == ["generate", "runs/small/model", "--prompt", "def "]
    generated = abyssal(*command, "--max-new-tokens", 5)
    assert generated.code == 0
    assert re.search(r"\b[1-5] new tokens", generated.err)  # drawn: any of them may end the text
    too_long = abyssal("generate", "runs/small/model", "--prompt", "x" * 64)
    assert (too_long.code, too_long.out) == (2, "")
    assert "prompt: has 65 tokens, but the model can attend to 64" in too_long.err


def test_interrupted_run_prints_the_command_that_goes_on(
    abyssal: Call, small_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, "train_step", call=5)
    result = abyssal("train", small_recipe, "--out", "my runs/a")
    assert result.code == 130
    assert steps(Path("my runs/a")) == [1, 2, 3, 4]
    command = result.command("interrupted; go on with: ")
    assert command == ["train", str(small_recipe), "--out", "my runs/a", "--resume"]
    resumed = abyssal(*command)
    assert (resumed.code, resumed.err) == (0, "")
    assert "going on with my runs/a/recipe.toml, the recipe 'small' that this run was started with\n" in resumed.out
    assert steps(Path("my runs/a")) == list(range(1, 13))


def test_run_interrupted_before_its_first_step_starts_again(
    abyssal: Call, small_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, "resolve", call=1)
    result = abyssal("train", small_recipe)
    assert result.code == 130
    assert result.err == "\ninterrupted before the first step\n"
    assert abyssal("train", small_recipe).code == 0


UNKNOWN = "there are demo, v3_16b, v3_671b, v3_671b_128k, v3_671b_32k, or give a path to a .toml file"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["demmo"], 2, f"demmo: no such recipe; nearest: demo; {UNKNOWN}"),
        (["gone.toml"], 2, "gone.toml: cannot read this recipe (No such file or directory)"),
        (["RECIPE", "--set", "model.hidden_sise=3"], 2, "model.hidden_sise: unknown field; nearest: hidden_size"),
        (["RECIPE", "--set", "train.tokens"], 2, "--set train.tokens: must read section.field=value"),
        (["RECIPE", "--set", "model.n_group=3"], 2, "model.n_group=3: must divide n_routed_experts=8"),
        (["RECIPE", "--set", "train.sequence_length=65"], 2, "must be at most model.max_position_embeddings=64"),
        (["RECIPE", "--set", 'data.corpus=["gone"]'], 1, "data.corpus='gone': no such file or folder"),
        (["RECIPE", "--set", 'data.corpus=["empty"]'], 1, "data.corpus='empty': no documents there"),
        (["RECIPE", "--set", 'data.corpus=["latin1"]'], 1, "latin1/a.py: not UTF-8 text"),
        (["RECIPE", "--set", "model.vocab_size=200"], 1, "vocab_size=200: must be at least 264"),
        (["RECIPE", "--resume"], 2, "runs/small: no run to resume here"),
        (["RECIPE", "--step-back"], 2, "--step-back: goes with --resume"),
        (["RECIPE", "--out", "begun"], 2, "begun: a run is here already; --resume continues it"),
        (
            ["RECIPE", "--out", "begun", "--resume", "--set", "seed=1"],
            2,
            "--set seed=1: a resumed run keeps the recipe",
        ),
        (["RECIPE", "--out", "file"], 1, "file/data: cannot prepare the data here"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_fault_is_one_sentence_and_leaves_no_run(
    abyssal: Call,
    small_recipe: Path,
    small_run: RunConfig,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    sentence: str,
) -> None:
    RunFolder(tmp_path / "begun").begin(small_run)
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin1").mkdir()
    (tmp_path / "latin1" / "a.py").write_bytes(b"a = '\xe9'\n")
    (tmp_path / "file").write_text("")
    result = abyssal("train", *(str(small_recipe) if word == "RECIPE" else word for word in arguments))
    assert result.code == code
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert sentence in result.err
    assert not (tmp_path / "runs" / "small" / "recipe.toml").exists()
    assert [path.name for path in (tmp_path / "begun").iterdir()] == ["recipe.toml"]


def test_init_from_must_be_a_model_directory(abyssal: Call, small_recipe: Path) -> None:
    result = abyssal("train", small_recipe, "--set", "init_from=gone")
    assert (result.code, result.err) == (1, "error: gone: no such model directory\n")


@pytest.mark.parametrize(("target", "code"), [("demmo", 2), ("demo", 1)])
def test_process_ends_with_the_code_of_the_fault(tmp_path: Path, target: str, code: int) -> None:
    command = [sys.executable, "-m", "abyssal", "train", target, "--set", 'data.corpus=["gone"]']
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == code
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_folder_of_a_run_is_told_from_its_model_directory(
    abyssal: Call, small_run: RunConfig, model_folder: Path
) -> None:
    RunFolder(Path("begun")).begin(small_run)
    for command in (["inspect", "begun"], ["generate", "begun", "--prompt", "x"]):
        result = abyssal(*command)
        assert result.code == 2
        assert "begun: is the folder of a run without a model yet; finish it with: abyssal train" in result.err
    model_folder.rename("begun/model")
    for command in (["inspect", "begun"], ["generate", "begun", "--prompt", "x"]):
        result = abyssal(*command)
        assert (result.code, result.err) == (
            2,
            "error: begun: is the folder of a run; its model directory is begun/model\n",
        )


def test_launcher_that_starts_a_run_again_steps_over_a_damaged_newest_state(
    abyssal: Call, small_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher of one rank with an id; a second launch begins by hand, and is restarted too."""
    launcher = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "first"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    command, states = ("train", small_recipe, "--out", "run"), Path("run/checkpoints")

    def damage(step: int) -> None:
        part = states / f"step-{step:08d}" / "__0_0.distcp"
        content = bytearray(part.read_bytes())
        content[100] ^= 1
        part.write_bytes(content)

    with monkeypatch.context() as patch:
        interrupt(patch, "train_step", call=11)
        assert abyssal(*command).code == 130
    damage(9)
    with monkeypatch.context() as patch:
        interrupt(patch, "train_step", call=6)  # behind step 11
        again = abyssal(*command)
    assert again.code == 130
    assert "started again by its launcher\n" in again.out
    assert "; set aside as damaged-step-00000009, and the run goes back to the state before\n" in again.out
    assert steps(Path("run")) == list(range(1, 12))

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    damage(9)
    by_hand = abyssal(*command, "--resume")
    assert by_hand.code == 1
    assert by_hand.err.count("resume with --step-back to set step-00000009 aside") == 1
    assert abyssal(*command, "--resume").code == 1  # it never came so far as to be known again
    with monkeypatch.context() as patch:
        interrupt(patch, "train_step", call=6)
        assert abyssal(*command, "--resume", "--step-back").code == 130
    damage(9)
    last = abyssal(*command, "--resume")
    assert last.code == 0, last.err
    assert "started again by its launcher\n" in last.out
    assert steps(Path("run")) == list(range(1, 13))
