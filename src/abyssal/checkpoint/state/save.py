"""The training state: a torch.distributed.checkpoint (DCP) folder that appears whole or not at all.

`root/step-00000123/` holds DCP's own files (`__<rank>_0.distcp`, `.metadata`), `progress.json` (where the run stands)
and `checksums.json` (the sha256 of every other file). The ranks of a run write one folder together, on a file system
that all of them see; any other number of ranks can read it, in any other layout.

Where a function takes a `group`, its ranks call it together, with a group whose backend serves the CPU (gloo) and which
nobody else uses meanwhile; all of them return, or all raise the same sentence. Without one, it is this process's alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from abyssal.checkpoint.joint_write import JointWrite
from abyssal.checkpoint.state.dcp import ReproducibleWriter, WritePlanner, dcp_faults
from abyssal.checkpoint.state.folders import remove_state, state_path, states, step_of
from abyssal.checkpoint.state.integrity import CHECKSUMS, METADATA, PROGRESS, render
from abyssal.checkpoint.state.local_shards import LocalShard, local_shards
from abyssal.errors import CheckpointError
from abyssal.files.atomic import atomic_directory, remove_stale
from abyssal.files.checksums import sha256
from abyssal.files.faults import check_free_space
from abyssal.ranks.ranks import Ranks

#: torch.save's frame around each tensor in a DCP file, generously.
TENSOR_OVERHEAD_BYTES = 4096
#: What a rank would write, and the digest of each tensor that must be the same wherever it is held.
Offer = tuple[SavePlan, dict[str, str]]
#: What a rank wrote, and the checksum of each of its files.
Written = tuple[list[WriteResult], dict[str, str]]


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
    shards = local_shards(tensors)
    return save_shards(root, step, shards, progress, keep, keep_multiples_of=keep_multiples_of, group=group)


def save_shards(
    root: Path,
    step: int,
    shards: Mapping[str, LocalShard],
    progress: Mapping[str, Any],
    keep: int,
    *,
    keep_multiples_of: int,
    group: ProcessGroup | None,
) -> Path:
    """Write a state of local shards; for everything else see `save_state`."""
    if keep < 1:
        raise ValueError(f"keep={keep}: must be at least 1")
    ranks, target = Ranks(group), state_path(root, step)
    _StateWrite(ranks, target, shards, json.dumps(dict(progress), indent=1) + "\n").run()

    def remove_older() -> None:
        older = [path for path in states(root) if step_of(path) < step]
        for path in older[: max(0, len(older) + 1 - keep)]:
            if not keep_multiples_of or step_of(path) % keep_multiples_of:
                remove_state(path)

    ranks.first(remove_older)
    return target


class _StateWrite(JointWrite[Offer, SavePlan, Written]):
    """The steps of a joint write of one state."""

    fault = CheckpointError
    doing = "write the training state"

    def __init__(self, ranks: Ranks, target: Path, shards: Mapping[str, LocalShard], progress: str) -> None:
        super().__init__(ranks, target)
        self.progress, self.planner = progress, WritePlanner(shards)
        self._metadata, self._nbytes = Metadata({}), 0  # the first rank's, from `plan` on

    def offer(self) -> Offer:
        plain = {name: shard for name, shard in self.planner.shards.items() if not shard.is_distributed}
        digests = {name: shard.digest() for name, shard in plain.items()} if self.ranks.world_size > 1 else {}
        return self.planner.create_local_plan(), digests

    def plan(self, offers: Sequence[Offer]) -> list[SavePlan]:
        self._refuse_different([digests for _, digests in offers])
        with dcp_faults(self.target, self.doing):
            plans, self._metadata = self.planner.create_global_plan([plan for plan, _ in offers])
            self._nbytes = sum(map(_nbytes, plans))
            return ReproducibleWriter(self.target).prepare_global_plan(plans)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        root = self.target.parent
        root.mkdir(parents=True, exist_ok=True)
        remove_stale(root)
        check_free_space(root, self._nbytes, CheckpointError)
        with atomic_directory(self.target) as folder:
            yield folder

    def write(self, folder: Path, plan: SavePlan) -> Written:
        with dcp_faults(self.target, self.doing):
            results = ReproducibleWriter(folder).write_data(self.planner.finish_plan(plan), self.planner).wait()
        return results, {file.name: sha256(file) for file in folder.glob(f"__{self.ranks.rank}_*")}

    def finish(self, folder: Path, written: Sequence[Written]) -> None:
        with dcp_faults(self.target, self.doing):
            ReproducibleWriter(folder).finish(self._metadata, [results for results, _ in written])
        (folder / PROGRESS).write_text(self.progress, encoding="utf-8")
        sums = {name: sha256(folder / name) for name in (METADATA, PROGRESS)}
        for _, files in written:
            sums |= files
        (folder / CHECKSUMS).write_text(render(sums), encoding="utf-8")

    def _refuse_different(self, digests: Sequence[Mapping[str, str]]) -> None:
        """Refuse tensors under one name that are plain and not the same: only one of them would be written."""
        first: dict[str, tuple[int, str]] = {}
        for rank, own in enumerate(digests):
            for name, digest in own.items():
                other, expected = first.setdefault(name, (rank, digest))
                if digest != expected:
                    raise CheckpointError(
                        f"{self.target}: {name} is not the same on {self.ranks.name(other)} and "
                        f"{self.ranks.name(rank)}; what differs between ranks must be a DTensor"
                    )


def _nbytes(plan: SavePlan) -> int:
    """Return what a plan needs on the disk."""
    parts = [item.tensor_data for item in plan.items if item.tensor_data is not None]
    return sum(prod(part.chunk.sizes) * part.properties.dtype.itemsize + TENSOR_OVERHEAD_BYTES for part in parts)
