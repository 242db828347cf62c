"""What a run's folder keeps of its expert loads: a bounded number, whatever the number of steps."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

from abyssal.plan.expert_loads import read_loads
from abyssal.report.metrics import read_metrics
from abyssal.train import run_folder
from abyssal.train.run_folder import EARLIER_LOADS, NEWEST_LOADS, RunFolder, keeps_load


def load_of(step: int) -> dict[int, list[int]]:
    return {1: [step, 1, 2], 2: [3, step, 5]}


def steps_kept(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in folder.loads.read_text().splitlines()]


def test_loads_stay_few_and_evenly_spaced_with_all_of_the_newest(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_folder, "NEWEST_LOADS", 8)
    monkeypatch.setattr(run_folder, "EARLIER_LOADS", 16)
    folder = RunFolder(tmp_path)
    for step in range(1, 700):
        folder.append_load(step, 10 * step, load_of(step))
        kept = steps_kept(folder)
        assert len(kept) <= 16 + 2 * 8
        assert kept[-min(step, 8) :] == list(range(max(1, step - 7), step + 1))
        early = [earlier for earlier in kept if earlier <= step - 2 * 8]
        assert len(early) < 8 or len({b - a for a, b in pairwise(early)}) == 1, kept
    assert len(early) > 8
    assert read_loads(tmp_path, 8).loads == ((sum(range(692, 700)), 8.0, 16.0), (24.0, sum(range(692, 700)), 40.0))


def test_an_interrupted_run_keeps_the_loads_of_an_undisturbed_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_folder, "NEWEST_LOADS", 8)
    monkeypatch.setattr(run_folder, "EARLIER_LOADS", 16)
    folders = {name: RunFolder(tmp_path / name) for name in ("whole", "cut")}
    for folder in folders.values():
        folder.path.mkdir()
    for step in range(1, 301):
        folders["whole"].append_load(step, step, load_of(step))
    seed, step = random.randrange(2**32), 0
    draw = random.Random(seed)
    while step < 300:
        step += 1
        folders["cut"].append_load(step, step, load_of(step))
        if draw.random() < 0.02:
            step -= draw.randint(0, min(step, 40))
            folders["cut"].cut_records(step)
    assert folders["cut"].loads.read_text() == folders["whole"].loads.read_text(), seed


def test_the_files_of_the_published_run_stay_small() -> None:
    """14.8T tokens are 242,785 steps; 58 MoE layers and one of MTP, 256 experts."""
    lines = max(sum(keeps_load(s, newest) for s in range(1, newest + 1)) for newest in (128, 640, 1024, 242_785))
    line = json.dumps({"step": 242_785, "expert_load": {layer: [1_966_080] * 256 for layer in range(3, 62)}})
    assert lines <= EARLIER_LOADS + NEWEST_LOADS
    assert (lines + NEWEST_LOADS) * len(line) < 120e6


def test_report_draws_thinned_loads_evenly_over_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_folder, "NEWEST_LOADS", 64)
    monkeypatch.setattr(run_folder, "EARLIER_LOADS", 256)
    folder = RunFolder(tmp_path)
    for step in range(1, 1001):
        folder.append_metrics({"step": step, "tokens": 10 * step, "loss": 2.0})
        folder.append_load(step, 10 * step, load_of(step))
    history = read_metrics(folder.metrics).loads
    ends = history.ends("steps")
    assert (ends[0], ends[-1]) == (8.0, 1000.0)
    assert max(b - a for a, b in pairwise(ends)) <= 8
    assert read_metrics(folder.metrics).steps == 1000
