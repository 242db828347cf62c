"""The training states of a run, each in a folder of its own under one root: `root/step-00000123`."""

from __future__ import annotations

import re
from pathlib import Path

from torch.distributed import ProcessGroup

from abyssal.errors import CheckpointError
from abyssal.files.atomic import remove_directory
from abyssal.files.faults import os_faults
from abyssal.ranks.ranks import Ranks


def state_path(root: Path, step: int) -> Path:
    """Return where the state after `step` stands, or would."""
    return root / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step after which the state at `path` was taken."""
    return int(path.name.removeprefix("step-"))


def states(root: Path, *, group: ProcessGroup | None = None) -> list[Path]:
    """Return the states under `root`, in the order of their steps, as the first rank of a group sees them."""

    def find() -> list[Path]:
        folders = root.glob("step-*") if root.is_dir() else []
        named = (path for path in folders if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir())
        return sorted(named, key=step_of)

    return Ranks(group).first(find)


def latest_state(root: Path, *, group: ProcessGroup | None = None) -> Path | None:
    """Return the state of the highest step under `root`, none if there is no state."""
    return max(states(root, group=group), key=step_of, default=None)


def remove_state(path: Path, *, group: ProcessGroup | None = None) -> None:
    """Remove a state, never seen in part; with a group, its first rank does.

    Raises:
        CheckpointError: the disk refused.
    """

    def remove() -> None:
        with os_faults(CheckpointError, path, "remove this training state"):
            remove_directory(path)

    Ranks(group).first(remove)
