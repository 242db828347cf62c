"""Records of a run are cut from their end, and a damaged line costs no other one."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from abyssal.train.json_lines import append_line, cut_lines, thin_lines


def write(path: Path, *lines: str) -> list[str]:
    path.write_text("".join(lines), encoding="utf-8")
    return list(lines)


def line(step: int, **fields: object) -> str:
    return json.dumps({"step": step, **fields}) + "\n"


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 1), (2, 3), (3, 4), (4, 5), (9, 5)])
def test_lines_of_later_steps_are_cut(tmp_path: Path, step: int, kept: int) -> None:
    lines = write(tmp_path / "m", line(1), line(2), line(2, validation=1.5), line(3), line(4))
    cut_lines(tmp_path / "m", step)
    assert (tmp_path / "m").read_text() == "".join(lines[:kept])


@pytest.mark.parametrize("end", ['{"step": 4, "lo', "{}\n", "\x00\x00\n", "[4]\n", '{"step": 4, "lo\n{"step": '])
def test_a_damaged_end_is_cut_and_a_damaged_line_before_costs_no_other(tmp_path: Path, end: str) -> None:
    lines = write(tmp_path / "m", line(1), '{"step": 2, "lo\n', line(3), end)
    cut_lines(tmp_path / "m", 3)
    assert (tmp_path / "m").read_text() == "".join(lines[:3])
    cut_lines(tmp_path / "m", 2)
    assert (tmp_path / "m").read_text() == lines[0]
    append_line(tmp_path / "m", {"step": 2, "loss": 1.0})
    assert (tmp_path / "m").read_text() == lines[0] + line(2, loss=1.0)


def test_nothing_is_cut_from_no_file_or_an_empty_one(tmp_path: Path) -> None:
    cut_lines(tmp_path / "gone", 3)
    assert not (tmp_path / "gone").exists()
    (tmp_path / "empty").touch()
    cut_lines(tmp_path / "empty", 3)
    assert (tmp_path / "empty").read_bytes() == b""


def test_cutting_a_large_file_reads_only_what_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with path.open("wb") as file:
        file.truncate(1 << 30)  # sparse: a gibibyte before the last lines
    with path.open("a") as file:
        file.write("\n" + line(7) + line(8))
    tracemalloc.start()
    try:
        cut_lines(path, 7)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert path.stat().st_size == (1 << 30) + 1 + len(line(7))


def test_thinning_keeps_lines_by_step_and_drops_damaged_ones(tmp_path: Path) -> None:
    lines = write(tmp_path / "m", line(1), line(2, load=[1, 2]), "{\n", line(3), line(4))
    thin_lines(tmp_path / "m", lambda step: step % 2 == 0)
    assert (tmp_path / "m").read_text() == lines[1] + lines[4]
