"""States written beside a run: what was asked for, whole, and no fault lost."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from abyssal.checkpoint.state import StateWriter, load_state, save_state, states
from abyssal.checkpoint.state import background_writer as module
from abyssal.errors import CheckpointError

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def content(value: float) -> dict[str, Any]:
    return {"model": {"weight": torch.full((2, 3), value)}, "count": torch.tensor(value)}


def test_state_holds_what_the_tensors_were_when_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, original = threading.Event(), module.save_shards

    def held(*arguments: Any, **options: Any) -> Path:
        assert go.wait(60)
        return original(*arguments, **options)

    monkeypatch.setattr(module, "save_shards", held)
    tensors, progress = content(1.0), {"step": 1}
    with StateWriter(tmp_path, keep=2) as writer:
        writer.save(1, tensors, progress)
        writer.check()  # under way: nothing to tell, nobody waits
        assert states(tmp_path) == []
        tensors["model"]["weight"].fill_(9.0)
        progress["step"] = 9
        go.set()
    target = content(0.0)
    assert load_state(states(tmp_path)[0], target) == {"step": 1}
    assert target["model"]["weight"].unique().tolist() == [1.0]


@pytest.mark.parametrize("call", ["check", "wait", "has", "save", "exit"])
def test_failed_write_is_told_at_the_next_call_and_leaves_earlier_states(tmp_path: Path, call: str) -> None:
    def run() -> None:
        with StateWriter(tmp_path, keep=1) as writer:
            with mock.patch("abyssal.files.atomic.flush_tree", side_effect=FULL):
                writer.save(2, content(2.0), {"step": 2})
                assert writer._thread is not None
                writer._thread.join()
            if call == "save":
                writer.save(3, content(3.0), {"step": 3})
            elif call == "has":
                writer.has(2)
            elif call != "exit":
                getattr(writer, call)()

    save_state(tmp_path, 1, content(1.0), {"step": 1}, keep=1)
    with pytest.raises(CheckpointError, match=r"step-00000002.*[Nn]o space left"):
        run()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_fault_that_ends_the_run_is_not_hidden_by_that_of_the_writer(tmp_path: Path) -> None:
    def run() -> None:
        with (
            mock.patch("abyssal.files.atomic.flush_tree", side_effect=FULL),
            StateWriter(tmp_path, keep=1) as writer,
        ):
            writer.save(2, content(2.0), {"step": 2})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run()
    assert "the last training state was not written" in caught.value.__notes__[0]


def test_every_so_many_stay_for_good_beside_the_newest(tmp_path: Path) -> None:
    with StateWriter(tmp_path, keep=2, keep_multiples_of=20) as writer:
        for step in range(10, 80, 10):
            writer.save(step, content(step), {"step": step})
            assert writer.has(step)
    assert [int(path.name[5:]) for path in states(tmp_path)] == [20, 40, 60, 70]
