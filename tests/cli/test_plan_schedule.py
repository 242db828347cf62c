"""`abyssal plan schedule`."""

import json
from xml.etree import ElementTree

import pytest

from abyssal.plan.schedules import build_schedule


def test_the_published_example_is_drawn_and_set_beside_the_others(abyssal):
    result = abyssal("plan", "schedule", "dualpipe", "--ranks", 8, "--micro-batches", 20)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == "DualPipe: 8 ranks, 8 stages, 20 micro-batches"
    assert [line.partition("  ")[0] for line in lines[2:10]] == [f"rank {rank}" for rank in range(8)]
    rows = {line.split("  ")[0]: line.split() for line in lines}
    assert rows["DualPipe"][1:] == ["8", "66", "6", "(9.1%)", "(P/2-1)(F&B+B-3W)", "6", "2×", "9"]
    assert rows["1F1B"][1:] == ["8", "81", "21", "(25.9%)", "(P-1)(F+B)", "21", "1×", "8"]
    assert rows["ZB1P"][1:] == ["8", "67", "7", "(10.4%)", "(P-1)(F+B-2W)", "7", "1×", "8"]
    assert "left out: micro_batches=20: interleaved 1F1B takes a multiple of ranks=8; nearest: 16, 24" in result.out


def test_json_holds_the_table_with_its_times(abyssal):
    arguments = ("--ranks", 3, "--micro-batches", 7, "--forward", 2, "--overlapped", 5, "--transfer", 0.5, "--json")
    facts = json.loads(abyssal("plan", "schedule", "dualpipev", *arguments).out)
    schedule = build_schedule("dualpipev", 3, 7)
    assert [[cell["cell"] for cell in rank["cells"]] for rank in facts["ranks"]] == [
        [str(cell) for cell in cells] for cells in schedule.ranks
    ]
    assert facts["times"] == {
        "forward": 2.0,
        "backward_input": 1.0,
        "backward_weight": 1.0,
        "overlapped": 5.0,
        "transfer": 0.5,
    }
    first = facts["ranks"][1]["cells"][0]  # waits for rank 0, whose stage has half of a rank's layers, and the message
    assert (first["cell"], first["start"], first["end"]) == ("1F0", 1.5, 2.5)
    makespan = facts["summary"]["makespan"]
    for rank in facts["ranks"]:
        assert sum(rank["parts"].values()) == pytest.approx(makespan)


def test_drawing_and_trace_are_written(abyssal, tmp_path):
    arguments = ("--ranks", 4, "--micro-batches", 8, "--stages-per-rank", 3, "--svg", "a.svg", "--trace", "b.json")
    result = abyssal("plan", "schedule", "interleaved", *arguments)
    assert result.out.endswith("written: a.svg\nwritten: b.json\n")
    assert "interleaved 1F1B: 4 ranks, 12 stages, 8 micro-batches" in (tmp_path / "a.svg").read_text()
    ElementTree.parse(tmp_path / "a.svg")
    events = json.loads((tmp_path / "b.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 4 * 2 * 3 * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dualpipe", "--micro-batches", 19), "micro_batches=19: DualPipe takes an even number"),
        (("dualpype",), "schedule dualpype: must be one of"),
        (("zb1p", "--forward", -1), "--forward -1: must be a number of at least 0"),
        (("zb1p", "--transfer", "nan"), "--transfer nan: must be a number of at least 0"),
        (("zb1p", "--overlapped", "inf"), "--overlapped inf: must be a number of at least 0"),
        (
            ("zb1p", "--forward", 0, "--backward-input", 0, "--backward-weight", 0),
            "--forward, --backward-input and --backward-weight are all 0",
        ),
        (("zb1p", "--svg", "a.json"), "--svg a.json: must end in .svg"),
        (("zb1p", "--trace", "a.svg"), "--trace a.svg: must end in .json"),
        (("zb1p", "--svg", "gone/a.svg"), "gone/a.svg: cannot write it"),
    ],
)
def test_a_fault_is_one_sentence(abyssal, tmp_path, arguments, message):
    result = abyssal("plan", "schedule", *arguments)
    assert result.code in (1, 2)
    assert result.err.startswith(f"error: {message}")
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
