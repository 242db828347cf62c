"""Whether a training state is what was written: its list of checksums, and what is done about a damaged one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch.distributed import ProcessGroup

from abyssal.checkpoint.state.folders import states, step_of
from abyssal.errors import CheckpointError, DamagedStateError
from abyssal.files.atomic import remove_directory
from abyssal.files.checksums import sha256
from abyssal.files.faults import os_faults
from abyssal.ranks.ranks import Ranks

PROGRESS, CHECKSUMS, METADATA = "progress.json", "checksums.json", ".metadata"
READING = "read the training state"


class DamagedState(NamedTuple):
    """A state that was set aside."""

    path: Path  # where it is now
    fault: str


def check_state(path: Path, *, group: ProcessGroup | None = None) -> None:
    """Compare every file of a state with its checksum; of a group, each rank takes its share of the files.

    Raises:
        CheckpointError: no such state, or it cannot be read.
        DamagedStateError: names the file that is damaged, missing or not of this state.
    """
    ranks = Ranks(group)

    def check() -> None:
        with advice(path):
            _check_files(path, ranks)

    ranks.together(check)


def set_damaged_states_aside(root: Path, *, group: ProcessGroup | None = None) -> list[DamagedState]:
    """Step back to the newest state that is intact: rename each damaged one after it, and return those, newest first.

    A state that was set aside is called `damaged-step-<step>`: no run resumes from it, and nothing removes it. Every
    file of the newest state is read, and of earlier ones as far as the steps go back. For a run that a launcher starts
    again; somebody who resumes by hand may want to look at the damage first.

    Raises:
        DamagedStateError: no state is intact; nothing was renamed.
        CheckpointError: the disk refused.
    """
    ranks, faults = Ranks(group), dict[Path, str]()
    for path in reversed(states(root, group=group)):
        fault = _fault(path, ranks)
        if fault is None:
            break
        faults[path] = fault
    else:
        for newest, fault in faults.items():
            raise DamagedStateError(f"{fault}; no state before {newest.name} is intact")

    def rename() -> list[DamagedState]:
        aside = []
        for path, fault in faults.items():
            target = path.with_name(f"damaged-{path.name}")
            with os_faults(CheckpointError, path, "set this training state aside"):
                if target.exists():
                    remove_directory(target)
                path.rename(target)
            aside.append(DamagedState(target, fault))
        return aside

    return ranks.first(rename)


@contextmanager
def advice(path: Path) -> Iterator[None]:
    """Add to the sentence about damage of the state `path` what to do about it."""
    try:
        yield
    except DamagedStateError as error:
        way_out = f"remove {path.name}, and the run begins anew, since no earlier state is there"
        if any(step_of(other) < step_of(path) for other in states(path.parent)):
            way_out = f"resume with --step-back to set {path.name} aside and go on from the state before it"
        raise DamagedStateError(f"{error}; {way_out}") from None


def read_checksums(path: Path) -> dict[str, str]:
    """Return the checksum of each file of a state.

    Raises:
        DamagedStateError: there are none, or they are not what was written.
        OSError: the disk refused.
    """
    file = path / CHECKSUMS
    try:
        sums = parse(file.read_bytes())
    except FileNotFoundError:
        raise DamagedStateError(f"{file}: no such file, so this is no whole training state") from None
    if sums is None:
        raise DamagedStateError(f"{file}: damaged")
    return sums


def check_file(path: Path, name: str, sums: Mapping[str, str]) -> None:
    """Compare one file of a state with its checksum.

    Raises:
        DamagedStateError: it is missing, or not what was written.
        OSError: the disk refused.
    """
    file = path / name
    if not file.is_file():
        raise DamagedStateError(f"{file}: missing from the training state")
    if sha256(file) != sums.get(name):
        raise DamagedStateError(f"{file}: damaged (its sha256 is not the one written with it)")


def render(sums: Mapping[str, str]) -> str:
    """Return the only text of `checksums.json` that stands for `sums`; `self` covers the list itself."""
    own = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    return json.dumps({"algorithm": "sha256", "files": dict(sorted(sums.items())), "self": own}, indent=1) + "\n"


def parse(data: bytes) -> dict[str, str] | None:
    """Return the checksum of each file of a state, none where `data` is not what `render` makes of them."""
    try:
        sums = json.loads(data)["files"]
        return dict(sums) if render(sums).encode() == data and all(Path(name).name == name for name in sums) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _fault(path: Path, ranks: Ranks) -> str | None:
    """Return what is damaged in a state, none if it is intact."""
    try:
        ranks.together(lambda: _check_files(path, ranks))
    except DamagedStateError as error:
        return str(error)
    return None


def _check_files(path: Path, ranks: Ranks) -> None:
    """Compare this rank's share of the files with their checksums."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such training state")
    with os_faults(CheckpointError, path, READING):
        sums = read_checksums(path)
        for name in sorted(sums)[ranks.rank :: ranks.world_size]:
            check_file(path, name, sums)
        for name in (PROGRESS, METADATA):
            if name not in sums:
                raise DamagedStateError(f"{path / CHECKSUMS}: does not list {name}")
