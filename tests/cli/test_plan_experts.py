"""`abyssal plan experts`."""

import json
from xml.etree import ElementTree

import pytest

LOADS = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
SIZES = ("--gpus", 8, "--redundant", 4, "--groups", 4, "--nodes", 2)


@pytest.fixture
def loads(tmp_path):
    (tmp_path / "loads.json").write_text(json.dumps(LOADS), encoding="utf-8")
    return "loads.json"


def test_the_published_example(abyssal, loads):
    facts = json.loads(abyssal("plan", "experts", loads, *SIZES, "--json").out)
    flat = [[expert for gpu in gpus for expert in gpu] for gpus in facts["placement"].values()]
    assert flat == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    # the busiest GPU of layer 0 has expert 0 and one of two copies of expert 1; before, experts 10 and 11
    assert facts["imbalance_after"]["0"] == pytest.approx((90 + 132 / 2) * 8 / sum(LOADS[0]))
    assert facts["imbalance_before"]["0"] == pytest.approx((183 + 86) * 8 / sum(LOADS[0]))


def test_before_and_after_are_printed_and_drawn(abyssal, loads, tmp_path):
    result = abyssal("plan", "experts", loads, *SIZES, "--svg", "experts.svg")
    assert result.code == 0, result.err
    assert "2 layers of 12 experts; load: loads.json\n" in result.out
    assert "16 places on 8 GPUs, 2 each: 4 redundant; 4 groups kept whole on 2 nodes\n" in result.out
    assert "before: in order, none copied  2.277 (layer 1)" in result.out
    assert "written: experts.svg" in result.out
    ElementTree.parse(tmp_path / "experts.svg")


def test_a_run_s_last_steps_are_read(abyssal, tmp_path):
    (tmp_path / "runs").mkdir()
    records = [{"step": step, "expert_load": {"1": [8, step, 2, 1]}} for step in range(1, 6)]
    (tmp_path / "runs" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = abyssal("plan", "experts", "runs", "--gpus", 2, "--redundant", 2, "--steps", 2)
    assert "load: the last 2 steps of runs/metrics.jsonl" in result.out
    assert "6 places on 2 GPUs, 3 each: 2 redundant; any copy on any GPU" in result.out


def test_copies_that_share_a_gpu_are_counted(abyssal, tmp_path):
    (tmp_path / "loads.json").write_text("[[100, 1]]")
    result = abyssal("plan", "experts", "loads.json", "--gpus", 2, "--redundant", 2)
    # three copies of expert 0 and one of expert 1, two places a GPU
    assert "copies that share a GPU with another one of the same expert, and so spread nothing: 1\n" in result.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("loads.json", "--gpus", 7), 2, "redundant=0: 12 experts and 0 copies cannot be divided equally among gpus=7"),
        (("loads.json", "--gpus", 4, "--nodes", 3), 2, "nodes=3: must divide gpus=4; nearest: 2, 4"),
        (("gone.json", "--gpus", 4), 1, "gone.json: cannot be read (No such file or directory); give a run's folder"),
        (("loads.json", "--gpus", 4, "--svg", "loads.json"), 2, "--svg loads.json: must end in .svg"),
    ],
)
def test_a_fault_is_one_sentence(abyssal, loads, tmp_path, arguments, code, message):
    result = abyssal("plan", "experts", *arguments)
    assert result.code == code
    assert result.err.startswith(f"error: {message}")
    assert result.err.count("\n") == 1
    assert json.loads((tmp_path / "loads.json").read_text()) == LOADS
