"""The training state: a torch.distributed.checkpoint (DCP) folder that appears whole or not at all.

`root/step-00000123/` holds DCP's own files (`__<rank>_0.distcp`, `.metadata`), `progress.json` (where the run stands)
and `checksums.json` (the sha256 of every other file). The ranks of a run write one folder together, on a file system
that all of them see; any other number of ranks can read it, in any other layout.

What is trusted: nothing that could run code. A state holds tensors only; DCP reads each with torch's weights-only
unpickler, its `.metadata` (a pickle) is read here by an unpickler that knows DCP's own record classes and nothing else,
and every file that the metadata names must be one of the folder's. The checksums find damage; they do not say who wrote
the files, since whoever changes a file can change its checksum too.

Where a function takes a `group`, its ranks call it together, with a group whose backend serves the CPU (gloo) and which
nobody else uses meanwhile; all of them return, or all raise the same sentence. Without one, it is this process's alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from abyssal.checkpoint.state.integrity import CHECKSUMS, METADATA, PROGRESS, parse
from abyssal.checkpoint.state.local_shards import Piece, ReadPlanner, dcp_faults, pieces
from abyssal.checkpoint.state.metadata import fit, misfit, read_metadata
from abyssal.checkpoint.state.save import JointWrite
from abyssal.errors import CheckpointError
from abyssal.files.atomic import remove_directory
from abyssal.files.checksums import sha256
from abyssal.files.faults import os_faults
from abyssal.ranks.ranks import Ranks

DOING = "read the training state"


def save_state(
    root: Path,
    step: int,
    tensors: Mapping[str, Any],
    progress: Mapping[str, Any],
    keep: int,
    *,
    keep_multiples_of: int = 0,
    group: ProcessGroup | None = None,
) -> Path:
    """Write `root/step-<step>/` whole or not at all, then remove the states of earlier steps beyond the newest `keep`.

    Args:
        root: the folder of all states of one run; what killed runs left half-written there is removed first.
        step: the optimizer step after which the state was taken.
        tensors: nested dicts with tensors as leaves (`{"model": ..., "optimizer": ...}`); read, not changed. Of a
            DTensor each rank writes its own part, once; a plain tensor must be equal on all ranks that have it.
        progress: what JSON can hold: step, sequences consumed, tokens; the first rank's counts.
        keep: how many states stay, this one included; later steps than this one are never removed.
        keep_multiples_of: states of these steps are never removed; 0: every state may be.
        group: the ranks that write the state together.

    Raises:
        CheckpointError: the state exists, a disk refused, or a plain tensor differs between ranks; earlier states are
            untouched.
        RankError: a rank is gone; the same holds.
        TypeError: a leaf is no tensor.
    """
    held = pieces(tensors)
    return write_pieces(root, step, held, progress, keep, keep_multiples_of=keep_multiples_of, group=group)


def write_pieces(
    root: Path,
    step: int,
    held: Mapping[str, Piece],
    progress: Mapping[str, Any],
    keep: int,
    *,
    keep_multiples_of: int,
    group: ProcessGroup | None,
) -> Path:
    """Write a state of pieces; for everything else see `save_state`."""
    if keep < 1:
        raise ValueError(f"keep={keep}: must be at least 1")
    ranks, target = Ranks(group), root / f"step-{step:08d}"
    JointWrite(ranks, target, held, json.dumps(dict(progress), indent=1) + "\n").run()

    def remove_older() -> None:
        older = [path for path in states(root) if _step(path) < step]
        for path in older[: max(0, len(older) + 1 - keep)]:
            if not keep_multiples_of or _step(path) % keep_multiples_of:
                remove_state(path)

    ranks.first(remove_older)
    return target


def remove_state(path: Path, *, group: ProcessGroup | None = None) -> None:
    """Remove a state, never seen in part; with a group, its first rank does.

    Raises:
        CheckpointError: the disk refused.
    """

    def remove() -> None:
        with os_faults(CheckpointError, path, "remove this training state"):
            remove_directory(path)

    Ranks(group).first(remove)


def states(root: Path, *, group: ProcessGroup | None = None) -> list[Path]:
    """Return the states under `root`, in the order of their steps, as the first rank of a group sees them."""

    def find() -> list[Path]:
        found = root.glob("step-*") if root.is_dir() else []
        return sorted((path for path in found if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()), key=_step)

    return Ranks(group).first(find)


def latest_state(root: Path, *, group: ProcessGroup | None = None) -> Path | None:
    """Return the state of the highest step under `root`, none if there is no state."""
    return max(states(root, group=group), key=_step, default=None)


def load_state(path: Path, tensors: Mapping[str, Any], *, group: ProcessGroup | None = None) -> dict[str, Any]:
    """Load a state into `tensors`, in place, and return its progress.

    The tensors' layout may be another than that in which they were written, on more or fewer ranks. Every checksum, by
    one rank each, and every name, shape and dtype is compared before the first value is copied.

    Raises:
        CheckpointError: no such state, a damaged file, or names, shapes or dtypes that do not fit `tensors`.
    """
    held, ranks = pieces(tensors), Ranks(group)
    check_state(path, group=group)
    metadata = ranks.together(lambda: _metadata(path))
    unfit = ranks.agree(lambda: fit(metadata, held), lambda fits: misfit(metadata, fits))
    if unfit is not None:
        raise CheckpointError(
            f"{path}: this training state is of another model or optimizer; {unfit}; "
            "resume with the recipe that it was written with"
        )
    ranks.together(lambda: _read(path, metadata, held))
    return read_progress(path, group=group)


def read_progress(path: Path, *, group: ProcessGroup | None = None) -> dict[str, Any]:
    """Return the progress of a state without its tensors, its own checksum compared.

    Raises:
        CheckpointError: no such state, or a damaged file.
    """

    def read() -> dict[str, Any]:
        with os_faults(CheckpointError, path, DOING):
            _check_file(path, PROGRESS, _read_checksums(path))
            progress: dict[str, Any] = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        return progress

    return Ranks(group).together(read)


def check_state(path: Path, *, group: ProcessGroup | None = None) -> None:
    """Compare every file of a state with its checksum; of a group, each rank takes its share of the files.

    Raises:
        CheckpointError: no such state, or names the file that is damaged, missing or not of this state.
    """
    ranks = Ranks(group)

    def check() -> None:
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such training state")
        with os_faults(CheckpointError, path, DOING):
            sums = _read_checksums(path)
            for name in sorted(sums)[ranks.rank :: ranks.world_size]:
                _check_file(path, name, sums)
            for name in (PROGRESS, METADATA):
                if name not in sums:
                    raise CheckpointError(f"{path / CHECKSUMS}: does not list {name}; {_way_out(path)}")

    ranks.together(check)


def adamw_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return an AdamW's state as {parameter name: {"step", "exp_avg", "exp_avg_sq"}}, the live tensors themselves.

    What a fresh optimizer creates at its first step is created here, as zeros, so that a state can be loaded into it.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    wide = torch.get_default_dtype() == torch.float64
    for parameter in parameters.values():
        state, group = optimizer.state[parameter], groups[id(parameter)]
        if not state:  # as torch's own AdamW does: the fused kernel wants an fp32 count beside the parameter
            fused = bool(group["fused"])
            device = parameter.device if fused or group["capturable"] else None
            state["step"] = torch.zeros((), dtype=torch.float64 if wide and not fused else torch.float32, device=device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return {name: dict(optimizer.state[parameter]) for name, parameter in parameters.items()}


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _metadata(path: Path) -> Metadata:
    file = path / METADATA
    with os_faults(CheckpointError, path, DOING):
        try:
            return read_metadata(file, _read_checksums(path).keys())
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}; {_way_out(path)}") from None


def _read(path: Path, metadata: Metadata, held: Mapping[str, Piece]) -> None:
    """Fill what this rank holds, in place."""
    planner, reader = ReadPlanner(held, metadata), FileSystemReader(path)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    with dcp_faults(path, DOING):
        reader.read_data(planner.create_local_plan(), planner).wait()


def _read_checksums(path: Path) -> dict[str, str]:
    file = path / CHECKSUMS
    try:
        sums = parse(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file, so this is no whole training state; {_way_out(path)}") from None
    if sums is None:
        raise CheckpointError(f"{file}: damaged; {_way_out(path)}")
    return sums


def _check_file(path: Path, name: str, sums: Mapping[str, str]) -> None:
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"{file}: missing from the training state; {_way_out(path)}")
    if sha256(file) != sums.get(name):
        raise CheckpointError(f"{file}: damaged (its sha256 is not the one written with it); {_way_out(path)}")


def _way_out(path: Path) -> str:
    if any((len(other.name), other.name) < (len(path.name), path.name) for other in states(path.parent)):
        return f"resume with --step-back to set {path.name} aside and go on from the state before it"
    return f"remove {path.name}, and the run begins anew, since no earlier state is there"
