"""Expert loads from files of JSON and from the metrics of runs."""

import json

import pytest

from abyssal.errors import DataError
from abyssal.plan.expert_loads import read_loads


def write_metrics(folder, *records, tail=""):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail, encoding="utf-8")
    return path


def test_metrics_are_summed_over_the_last_steps_that_have_a_load(tmp_path):
    records = [{"step": step, "expert_load": {"1": [step, 0, 1], "2": [2, step, 3]}} for step in range(1, 6)]
    write_metrics(tmp_path, *records, {"step": 6, "refused": "loss", "refused_sequences": [[0, 8]]})
    read = read_loads(tmp_path, 3)
    assert read.layers == ("1", "2")
    assert read.loads == ((12, 0, 3), (6, 12, 9))
    assert read.source == f"the last 3 steps of {tmp_path / 'metrics.jsonl'}"
    assert read_loads(tmp_path / "metrics.jsonl", 1).loads == ((5, 0, 1), (2, 5, 3))
    assert read_loads(tmp_path, 100).source.startswith("the last 5 steps of")


def test_a_line_that_is_still_being_written_is_left(tmp_path):
    write_metrics(tmp_path, {"step": 1, "expert_load": {"0": [1, 2]}}, tail='{"step": 2, "expert_lo')
    assert read_loads(tmp_path, 9).loads == ((1, 2),)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("[[1, 2.5], [0, 4]]", ("0", "1")), ('{"3": [1, 2.5], "7": [0, 4]}', ("3", "7"))],
)
def test_json_is_a_list_a_layer_or_a_table_by_layer(tmp_path, text, layers):
    path = tmp_path / "loads.json"
    path.write_text(text, encoding="utf-8")
    read = read_loads(path, 9)
    assert (read.layers, read.loads, read.source) == (layers, ((1.0, 2.5), (0.0, 4.0)), str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1, 2], [3]]", "layer 1 has 1 experts, the layers before have 2"),
        ("[[1, -2]]", "layer 0, expert 1: load -2 must be a number of at least 0"),
        ("[[1, NaN]]", "layer 0, expert 1: load nan must be"),
        ("[[1, Infinity]]", "layer 0, expert 1: load inf must be"),
        ('[[1, "2"]]', "layer 0, expert 1: load '2' must be"),
        ("[[true]]", "layer 0, expert 0: load True must be"),
        ("[1, 2]", "layer 0: must be a list of at least one load a layer"),
        ("[[]]", "layer 0: must be a list of at least one load a layer"),
        ("[]", "must be a list of at least one load a layer"),
        ("3", "must be a list of at least one load a layer"),
        ("[[1, 2]", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_json_that_holds_no_loads_is_refused(tmp_path, text, message):
    path = tmp_path / "loads.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as fault:
        read_loads(path, 9)
    assert str(path) in str(fault.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"step": 1}'], "has no expert_load, so the run has not finished a step or its model has no experts"),
        (["{", '{"step": 2}'], "line 1: is not JSON"),
        (
            ['{"expert_load": {"0": [1, 2]}}', '{"expert_load": {"0": [1, 2, 3]}}'],
            "line 2: its layers or experts differ from those of the steps before",
        ),
        (['{"expert_load": {"0": [1, -2]}}'], "line 1: layer 0, expert 1: load -2 must be"),
    ],
)
def test_metrics_that_hold_no_loads_are_refused(tmp_path, lines, message):
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_loads(tmp_path, 9)


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.json: cannot be read \(No such file or directory\); give a run's"):
        read_loads(tmp_path / "gone.json", 9)
    (tmp_path / "loads.json").write_bytes(b"\xff\xfe[[1]]")
    with pytest.raises(DataError, match="not UTF-8"):
        read_loads(tmp_path / "loads.json", 9)
