"""`abyssal train --dry-run`: what a run would be, without data, files or other processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

Call = Callable[..., Any]


def test_2048_ranks_are_laid_out_and_counted_in_one_process(abyssal: Call) -> None:
    result = abyssal("train", "v3_671b", "--dry-run", "--world-size", 2048)
    assert (result.code, result.err) == (0, "")
    assert "2048 ranks: pp 16 * dp_replicate 1 * edp 2 * ep 64\n" in result.out
    assert "parameters of all stages: main model 671,026,419,200, MTP modules 11,610,068,224, second" in result.out
    rows = {line.split()[0]: line for line in result.out.splitlines() if line and line[0].isdigit()}
    assert "2047" in rows
    assert "4 MoE blocks" in result.out
    assert list(Path().iterdir()) == []
    assert not dist.is_initialized()


def test_json_holds_every_figure_exactly(abyssal: Call) -> None:
    result = abyssal("train", "v3_671b", "--dry-run", "--world-size", 1024, "--set", "parallel.zero_stage=3", "--json")
    assert (result.code, result.err) == (0, "")
    facts = json.loads(result.out)
    assert facts["layout"]["world_size"] == 1024
    assert facts["elements"]["main"] == 671_026_419_200
    (experts,) = [p for p in facts["parts"]["MoE block"]["parameters"] if p["name"].endswith("gate_up_proj")]
    assert (experts["shape"], experts["local"]) == ([256, 4096, 7168], [4, 4096, 7168])
    assert len(facts["stages"]) == 16
    for stage in facts["stages"]:
        kinds = {name: size for name, size in stage["memory"].items() if name != "total"}
        assert stage["memory"]["total"] == sum(kinds.values()) > 0


def test_without_a_world_size_it_is_one_rank_and_the_compute_dtype_is_assumed(abyssal: Call) -> None:
    result = abyssal("train", "demo", "--dry-run")
    assert (result.code, result.err) == (0, "")
    assert "1 ranks: pp 1 * dp_replicate 1 * edp 1 * ep 1\n" in result.out
    assert "compute dtype: bfloat16, since the recipe leaves it to the machine (train.compute_dtype)" in result.out
    assert list(Path().iterdir()) == []


def test_figures_are_whole_on_a_narrow_terminal(abyssal: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    result = abyssal("train", "demo", "--dry-run")
    assert "parameters of all stages: main model 9,020,952, MTP modules 2,158,152\n" in result.out
    (row,) = [line.split() for line in result.out.splitlines() if line.startswith("MoE block")]
    assert row[2:5] == ["2,026,312", "2,026,312", "8.105"]


@pytest.mark.parametrize(
    "fields",
    [
        {"zero_stage": 2, "ep_size": 2},
        {"zero_stage": 3, "ep_size": 4, "dispatch": "node_limited", "node_size": 2},
        {"dp_replicate_size": 2, "ep_size": 2, "dispatch_dtype": "fp8"},
        {"dp_shard_size": 8, "ep_size": 8, "dispatch": "node_limited"},
        {"pp_size": 2, "ep_size": 4},
    ],
)
def test_small_layouts_have_one_too(abyssal: Call, fields: dict[str, object]) -> None:
    options = [part for name, value in fields.items() for part in ("--set", f"parallel.{name}={value}")]
    result = abyssal("train", "demo", "--dry-run", "--world-size", 8, "--set", "optimizer.name=adamw", *options)
    assert (result.code, result.err) == (0, "")
    assert "main model 9,020,952" in result.out


def test_bytes_that_are_not_counted_are_named(abyssal: Call) -> None:
    for options, named in (([], True), (["--set", "optimizer.name=adamw"], False)):
        result = abyssal("train", "demo", "--dry-run", "--world-size", 2, *options)
        assert result.code == 0
        assert ("Not counted: the rows that Muon sends" in result.out) is named


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["v3_671b", "--dry-run", "--world-size", 2000], "2000 ranks: must be pp_size=16 * "),
        (["v3_671b", "--dry-run", "--world-size", 2000], "nearest: 1024, 2048"),
        (["v3_671b", "--dry-run"], "nearest: 1024"),
        (["v3_671b", "--dry-run", "--world-size", 4096], "nearest: 256"),
        (["demo", "--dry-run", "--world-size", 0], "--world-size 0: must be at least 1"),
        (["demo", "--dry-run", "--world-size", 8, "--set", "parallel.ep_size=3"], "nearest: 2, 4"),
        (["demo", "--dry-run", "--resume"], "--resume: a dry run reads and writes no run's folder"),
        (["demo", "--dry-run", "--out", "x"], "--out x: a dry run reads and writes no run's folder"),
        (["demo", "--world-size", 8], "--world-size 8: of a dry run only (add --dry-run)"),
        (["demo", "--json"], "--json: of a dry run only (add --dry-run)"),
        (["v3_671b"], "1 ranks: must be pp_size=16"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(abyssal: Call, arguments: list[object], sentence: str) -> None:
    result = abyssal("train", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert sentence in result.err
    assert list(Path().iterdir()) == []


def test_under_torchrun_it_is_refused(abyssal: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = abyssal("train", "demo", "--dry-run", "--world-size", 8)
    assert (result.code, result.out) == (2, "")
    assert "WORLD_SIZE=2: a dry run is one process, whatever --world-size is" in result.err
