"""`abyssal report`: a page in the run's folder, or where it is wanted; every fault is one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs, a and b, of one step each."""
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        record = {"step": 1, "tokens": 64, "loss": 5.5}
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path / "runs"


def test_page_of_one_run_goes_into_its_folder(abyssal: Call, runs: Path) -> None:
    result = abyssal("report", "runs/a")
    assert (result.code, result.out, result.err) == (0, "report: runs/a/report.html\n", "")
    assert (runs / "a" / "report.html").read_text().startswith("<!doctype html>")


def test_page_of_several_goes_here_or_where_it_is_wanted(abyssal: Call, runs: Path) -> None:
    assert abyssal("report", "runs/a", "runs/b").out == "report: report.html\n"
    assert abyssal("report", "runs/a", "runs/b", "--out", "runs/both.html").out == "report: runs/both.html\n"
    assert "2 runs: a, b" in (runs / "both.html").read_text()
    assert not (runs / "a" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["runs/aa"], 2, "runs/aa: no such folder of a run; "),
        (
            ["runs"],
            2,
            "runs: is not the folder of a run (neither recipe.toml nor metrics.jsonl is in it); runs there: ",
        ),
        (["runs/a", "--out", "runs/a/metrics.jsonl"], 2, "--out runs/a/metrics.jsonl: must end in .html"),
        (["runs/a", "--out", "gone/a.html"], 1, "gone/a.html: cannot write the report (No such file or directory"),
        ([], 2, "Missing argument 'RUN'"),
    ],
)
def test_fault_is_a_sentence(abyssal: Call, runs: Path, arguments: list[str], code: int, sentence: str) -> None:
    result = abyssal("report", *arguments)
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(f"error: {sentence}")
    assert (runs / "a" / "metrics.jsonl").read_text().startswith("{")


def test_run_ends_with_its_page_and_says_where(abyssal: Call, small_recipe: Path) -> None:
    result = abyssal("train", small_recipe)
    assert result.code == 0
    assert "\nreport: runs/small/report.html\n" in result.out
    page = Path("runs/small/report.html").read_text()
    assert "Folder small; finished." in page
    assert "bits per byte" in page
