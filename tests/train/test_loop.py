"""A whole run: to its end, interrupted and resumed, and met with every fault a user can cause."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from abyssal.checkpoint.state import states
from abyssal.config import RunConfig
from abyssal.config.run import DataConfig, SourceConfig
from abyssal.errors import AbyssalError, CheckpointError, ConfigError, DataError, UsageError
from abyssal.train import loop
from abyssal.train.run_folder import RunFolder

SILENT = Console(quiet=True)


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def losses(path: Path) -> dict[int, tuple[float, ...]]:
    """Return everything of a step that must not depend on interruptions."""
    return {
        r["step"]: (r["loss"], *r["mtp_losses"], r["gradient_norm"], r["max_violation"])
        for r in metrics(path)
        if "loss" in r
    }


def test_run_ends_with_a_model_directory_and_falling_loss(small_run: RunConfig, tmp_path: Path) -> None:
    model = loop.start(small_run, tmp_path / "run", SILENT)
    records = metrics(tmp_path / "run")
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert [r["step"] for r in records if "validation_bits_per_byte" in r] == [5, 10, 12]
    assert {p.name for p in model.iterdir()} >= {"config.json", "tokenizer.json", "README.md", "model.safetensors"}
    assert [p.name for p in states(tmp_path / "run" / "checkpoints")] == ["step-00000009", "step-00000012"]


@pytest.mark.slow
def test_run_of_a_mixture_with_masked_documents_resumes_to_the_bit(
    small_run: RunConfig, corpus: Path, tmp_path: Path
) -> None:
    data = DataConfig(
        sources=(
            SourceConfig(name="even", paths=tuple(map(str, sorted(corpus.glob("*[02468].py")))), weight=0.7),
            SourceConfig(name="odd", paths=tuple(map(str, sorted(corpus.glob("*[13579].py")))), weight=0.3),
        ),
        split_modulus=5,
        fim_rate=0.3,
        split_merged_rate=0.2,
        mask_documents=True,
    )
    run = RunConfig.model_validate(small_run.model_dump() | {"data": data.model_dump()})
    loop.start(run, tmp_path / "whole", SILENT)
    loop.start(run, tmp_path / "cut", SILENT)
    assert [r["step"] for r in metrics(tmp_path / "whole") if "loss" in r] == list(range(1, 13))
    newest = states(tmp_path / "cut" / "checkpoints")[-1]
    shutil.rmtree(newest)
    loop.resume(tmp_path / "cut", SILENT)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_exported_directory_continues_the_same_text_in_transformers(small_run: RunConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from abyssal.engine import Engine, Request, SamplingParameters, load_model

    path = loop.start(small_run, tmp_path / "run", SILENT)
    ours = load_model(path, dtype="float32")
    prompt = ours.encode_prompt("def value")
    request = Request(prompt, SamplingParameters(max_new_tokens=24, temperature=0.0), end_ids=frozenset())
    continued = [output.token.id for output in Engine.of(ours).stream(request) if output.token is not None]

    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert tokenizer("def value")["input_ids"] == prompt
    with torch.inference_mode():
        output = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=-1)
    assert output[0, len(prompt) :].tolist() == continued


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_interrupted_run_resumes_with_the_same_losses_to_the_bit(
    small_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    small_run = change(small_run, optimizer={"name": optimizer})
    loop.start(small_run, tmp_path / "whole", SILENT)
    whole_step, stop_at = loop.train_step, random.randint(4, 11)
    calls = 0

    def interrupted_step(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return whole_step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        loop.start(small_run, tmp_path / "cut", SILENT)
    monkeypatch.undo()
    loop.resume(tmp_path / "cut", SILENT)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole"), f"interrupted in step {stop_at}"
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_killed_process_resumes_with_the_same_losses_to_the_bit(
    small_run: RunConfig, small_recipe: Path, tmp_path: Path
) -> None:
    loop.start(small_run, tmp_path / "whole", SILENT)
    command = [sys.executable, "-m", "abyssal", "train", str(small_recipe), "--out", str(tmp_path / "cut")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (tmp_path / "cut" / "checkpoints" / "step-00000003").exists():
            time.sleep(0.002)
        time.sleep(random.random() * 0.1)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    finished = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_resuming_a_finished_run_writes_the_model_again_and_trains_no_further(
    small_run: RunConfig, tmp_path: Path
) -> None:
    model = loop.start(small_run, tmp_path / "run", SILENT)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").unlink()
    loop.resume(tmp_path / "run", SILENT)
    assert (model / "model.safetensors").read_bytes() == weights
    assert len(losses(tmp_path / "run")) == 12


def test_resume_needs_no_documents_any_more(small_run: RunConfig, corpus: Path, tmp_path: Path) -> None:
    loop.start(small_run, tmp_path / "run", SILENT)
    for document in corpus.iterdir():
        document.unlink()
    loop.resume(tmp_path / "run", SILENT)


def test_second_start_in_the_same_folder_is_refused(small_run: RunConfig, tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").begin(small_run)
    with pytest.raises(UsageError, match="a run is here already; --resume"):
        loop.start(small_run, tmp_path / "run", SILENT)


def test_resume_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run to resume here"):
        loop.resume(tmp_path / "run", SILENT)


def test_damaged_shard_is_named_before_training_goes_on(small_run: RunConfig, tmp_path: Path) -> None:
    loop.start(small_run, tmp_path / "run", SILENT)
    shard = tmp_path / "run" / "data" / "train-00000.tokens.npy"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000\.tokens\.npy"):
        loop.resume(tmp_path / "run", SILENT)


def test_damaged_checkpoint_is_named_and_the_one_before_it_serves(small_run: RunConfig, tmp_path: Path) -> None:
    loop.start(small_run, tmp_path / "run", SILENT)
    newest = states(tmp_path / "run" / "checkpoints")[-1]
    before = losses(tmp_path / "run")
    part = newest / "__0_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match="step-00000012"):
        loop.resume(tmp_path / "run", SILENT)
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    loop.resume(tmp_path / "run", SILENT)
    assert losses(tmp_path / "run") == before


FULL_DISK = """
import resource, signal, sys, time
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
from rich.console import Console
from abyssal.config import load_recipe
from abyssal.errors import AbyssalError
from abyssal.train import loop
calls = 0
step = loop.train_step
def limited_step(*arguments, **options):
    global calls
    calls += 1
    if calls == 5:  # after the first checkpoint, before the second
        while not (Path(sys.argv[2]) / "checkpoints" / "step-00000003").exists():  # it is written meanwhile
            time.sleep(0.001)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return step(*arguments, **options)
loop.train_step = limited_step
try:
    loop.start(load_recipe(sys.argv[1]), Path(sys.argv[2]), Console(quiet=True))
except AbyssalError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.slow
def test_write_that_fails_leaves_earlier_checkpoints_and_no_half_one(
    small_run: RunConfig, small_recipe: Path, tmp_path: Path
) -> None:
    loop.start(small_run, tmp_path / "whole", SILENT)
    run = tmp_path / "run"
    command = [sys.executable, "-c", FULL_DISK, str(small_recipe), str(run)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1, finished.stderr
    assert "step-00000006" in finished.stdout
    assert len(finished.stdout.splitlines()) == 1
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000003"]
    loop.resume(run, SILENT)
    assert losses(run) == losses(tmp_path / "whole")


def change(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    values = config.model_dump()
    for section, fields in sections.items():
        values[section] |= fields
    return RunConfig.parse(values, "test")


@pytest.mark.parametrize(
    ("sections", "fault", "sentence"),
    [
        ({"data": {"corpus": ("no/such/folder",)}}, DataError, "no/such/folder"),
        ({"data": {"suffixes": (".nothing",)}}, DataError, "corpus"),
        ({"model": {"eos_token_id": 2}}, ConfigError, "model.eos_token_id=2: must be the tokenizer's, 1"),
    ],
)
def test_fault_of_the_recipe_is_one_sentence_and_leaves_no_run(
    small_run: RunConfig, tmp_path: Path, sections: dict[str, Any], fault: type[AbyssalError], sentence: str
) -> None:
    with pytest.raises(fault, match=sentence):
        loop.start(change(small_run, **sections), tmp_path / "run", SILENT)
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_init_from_continues_from_a_model_directory(small_run: RunConfig, tmp_path: Path) -> None:
    first = loop.start(small_run, tmp_path / "first", SILENT)
    again = RunConfig.parse(small_run.model_dump() | {"init_from": str(first)}, "test")
    loop.start(again, tmp_path / "second", SILENT)
    assert losses(tmp_path / "second")[1][0] < losses(tmp_path / "first")[6][0]
    other = change(again, model={"hidden_size": 26})
    with pytest.raises(ConfigError, match=r"hidden_size=26 \(there 24\)"):
        loop.start(other, tmp_path / "third", SILENT)
    assert not (tmp_path / "third").exists()


def test_time_budget_becomes_tokens_that_the_stored_recipe_keeps(small_run: RunConfig, tmp_path: Path) -> None:
    config = change(small_run, train={"time_budget_s": 0.5})
    loop.start(config, tmp_path / "run", SILENT)
    stored = RunFolder(tmp_path / "run").resolved_config()
    assert stored.train.time_budget_s is None
    assert stored.train.tokens % (4 * 32) == 0
    assert max(losses(tmp_path / "run")) == stored.train.tokens // (4 * 32)


def test_corpus_without_validation_documents_trains_all_the_same(small_run: RunConfig, tmp_path: Path) -> None:
    config = change(small_run, data={"split_modulus": 10**9})
    loop.start(config, tmp_path / "run", SILENT)
    assert not [r for r in metrics(tmp_path / "run") if "validation_loss" in r]
