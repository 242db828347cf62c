"""`abyssal prepare`: a data folder, and the command that trains on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


def test_data_folder_is_made_once_and_the_printed_command_trains_on_it(
    abyssal: Call, small_recipe: Path, corpus: Path
) -> None:
    (corpus / "nothing.py").write_text("")
    changes = ("--set", "model.vocab_size=290", "--set", f'data.corpus=["{corpus}"]')
    result = abyssal("prepare", small_recipe, *changes, "--out", "my data", "--workers", 1)
    assert (result.code, result.err) == (0, "")
    manifest = json.loads(Path("my data/manifest.json").read_text())
    for name, split in manifest["splits"].items():
        line = f"{name}: {split['documents']:,} documents, {split['bytes']:,} bytes, {split['tokens']:,} tokens\n"
        assert line in result.out
    assert "left out: 1 empty\n" in result.out
    files = {path.name: path.stat().st_mtime_ns for path in Path("my data").iterdir()}

    again = abyssal("prepare", small_recipe, *changes, "--out", "my data", "--workers", 1)
    assert (again.code, again.out) == (0, result.out)
    trained = abyssal(*result.command("train on it: "))
    assert trained.code == 0, trained.err
    assert not Path("runs/small/data").exists()
    assert {path.name: path.stat().st_mtime_ns for path in Path("my data").iterdir()} == files


def test_folder_made_from_something_else_is_refused(abyssal: Call, small_recipe: Path, corpus: Path) -> None:
    assert abyssal("prepare", small_recipe, "--out", "data", "--workers", 1).code == 0
    other = abyssal("prepare", small_recipe, "--out", "data", "--set", "model.vocab_size=290")
    assert (other.code, other.out) == (1, "")
    assert other.err == (
        "error: data: was prepared with vocab_size=300, not 290; choose another folder or delete this one\n"
    )
    (corpus / "new.py").write_text("new\n")
    edited = abyssal("prepare", small_recipe, "--out", "data")
    assert edited.code == 1
    assert "was prepared from other documents: files were added, removed or edited since" in edited.err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--out", "data", "--set", 'data.corpus=["gone"]'], 1, "data.corpus='gone': no such file or folder"),
        (["--out", "data", "--set", "data.corpus=[]"], 1, "data.corpus=[]: must name folders, text files or .jsonl"),
        (["--out", "data", "--set", 'tokenizer.path="gone.json"'], 1, "gone.json: no such file"),
        (["--out", "small.toml"], 1, "small.toml: cannot prepare the data here"),
        (["--out", "data", "--workers", "-1"], 2, "Invalid value for '--workers'"),
        ([], 2, "Missing option '--out'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_fault_is_a_sentence_and_its_exit_code(
    abyssal: Call, small_recipe: Path, arguments: list[str], code: int, sentence: str
) -> None:
    result = abyssal("prepare", small_recipe, *arguments)
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith("error: ")
    assert sentence in result.err
    assert not Path("data/manifest.json").exists()
