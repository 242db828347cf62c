"""Whatever happens to the states of a run, in any order: each is whole and right, and the newest stay."""

import errno
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from abyssal.checkpoint.state import check_state, latest_state, load_state, read_progress, save_state, states
from abyssal.errors import CheckpointError

STEPS = st.integers(1, 40)
#: Where a save can fail: before DCP, inside, after it, and at the rename.
POINTS = (
    "abyssal.checkpoint.state.save.check_free_space",
    "abyssal.checkpoint.state.save.ReproducibleWriter.write_data",
    "abyssal.checkpoint.state.save.ReproducibleWriter.finish",
    "abyssal.checkpoint.state.save.sha256",
    "abyssal.files.atomic.flush_tree",
    "abyssal.files.atomic._put_in_place",
)


def content(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((2, 3), float(step)), "count": torch.tensor(step)}


class States(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.steps: set[int] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(step=STEPS, keep=st.integers(1, 3))
    def save(self, step: int, keep: int) -> None:
        if step in self.steps:
            with pytest.raises(CheckpointError, match="File exists"):
                save_state(self.root, step, content(step), {"step": step}, keep)
            return
        save_state(self.root, step, content(step), {"step": step}, keep)
        older = sorted(other for other in self.steps if other < step)
        self.steps -= set(older[: max(0, len(older) - (keep - 1))])
        self.steps.add(step)
        assert sorted(self.root.iterdir()) == states(self.root), "half-written states were left"

    @rule(step=STEPS, point=st.sampled_from(POINTS), fault=st.sampled_from([OSError, KeyboardInterrupt]))
    def fail(self, step: int, point: str, fault: type[BaseException]) -> None:
        error = fault(errno.ENOSPC, os.strerror(errno.ENOSPC)) if fault is OSError else fault()
        expected = CheckpointError if fault is OSError or step in self.steps else fault
        if point.endswith("check_free_space"):
            expected = CheckpointError if fault is OSError else fault
        with mock.patch(point, side_effect=error), pytest.raises(expected):
            save_state(self.root, step, content(step), {"step": step}, 1)

    @rule(step=STEPS)
    def leave_half_a_state(self, step: int) -> None:
        left = self.root / f".step-{step:08d}.writing-00000000"
        left.mkdir(exist_ok=True)
        (left / "__0_0.distcp").write_bytes(b"half")

    @precondition(lambda self: self.steps)
    @rule()
    def damage_and_remove_the_latest(self) -> None:
        latest = latest_state(self.root)
        with (latest / "__0_0.distcp").open("r+b") as file:
            file.write(b"X")
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp: damaged"):
            load_state(latest, content(0))
        shutil.rmtree(latest)
        self.steps.remove(max(self.steps))

    @invariant()
    def each_state_is_whole_and_right(self) -> None:
        assert [read_progress(path)["step"] for path in states(self.root)] == sorted(self.steps)
        for path in states(self.root):
            check_state(path)
        if self.steps:
            target = content(0)
            newest = load_state(latest_state(self.root), target)["step"]
            assert newest == max(self.steps)
            assert all(torch.equal(target[name], tensor) for name, tensor in content(newest).items())


States.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
TestStates = States.TestCase
