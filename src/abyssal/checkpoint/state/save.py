"""One training state written by all ranks of a run: planned together, each rank's part by itself, put in place once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from abyssal.checkpoint.state.integrity import CHECKSUMS, METADATA, PROGRESS, render
from abyssal.checkpoint.state.local_shards import Piece, WritePlanner, dcp_faults
from abyssal.errors import CheckpointError
from abyssal.files.atomic import atomic_directory, remove_stale
from abyssal.files.checksums import sha256
from abyssal.files.faults import check_free_space, os_faults
from abyssal.ranks.ranks import Ranks

#: torch.save's frame around each tensor in a DCP file, generously.
TENSOR_OVERHEAD_BYTES = 4096
DOING = "write the training state"
#: What a rank would write, and the digest of each tensor that must be the same wherever it is held.
Offer = tuple[SavePlan, dict[str, str]]
#: What a rank wrote, and the checksum of each of its files.
Written = tuple[list[WriteResult], dict[str, str]]


class ReproducibleWriter(FileSystemWriter):
    """DCP's writer, which leaves out what differs between equal states: the path, a random name, an order by device."""

    def __init__(self, path: Path) -> None:
        """Write into `path`."""
        super().__init__(path, per_thread_copy_ahead=0)

    def storage_meta(self) -> StorageMeta:
        """Return nothing but the type."""
        return StorageMeta()


class JointWrite:
    """The steps of one write: every rank takes `offer` and `put`; the first, which decides, `begin` and `finish` too.

    Only the first rank makes the staging folder, holds its lock and renames it. Whichever rank is killed, and whenever,
    there is the whole state or none, and the next write removes what was left of it.
    """

    def __init__(self, ranks: Ranks, target: Path, held: Mapping[str, Piece], progress: str) -> None:
        """Prepare to write to `target` what this rank holds, and the text of the progress."""
        self.ranks, self.target, self.progress = ranks, target, progress
        self.planner = WritePlanner(held)
        self._staging, self._metadata = target, Metadata({})  # the first rank's, from `begin` on

    def run(self) -> None:
        """Take all steps, together with the other ranks.

        Raises:
            CheckpointError: one of them could not; there is no state.
        """
        with ExitStack() as stack:
            name, plan = self.ranks.scatter(self.offer, lambda offers: self.begin(offers, stack))
            staging = self.target.with_name(name)
            self.ranks.agree(lambda: self.put(staging, plan), lambda written: self.finish(written, stack))

    def offer(self) -> Offer:
        """Say what this rank holds."""
        plain = {name: piece for name, piece in self.planner.held.items() if not piece.sharded}
        digests = {name: piece.digest() for name, piece in plain.items()} if self.ranks.world_size > 1 else {}
        return self.planner.create_local_plan(), digests

    def begin(self, offers: Sequence[Offer], stack: ExitStack) -> list[tuple[str, SavePlan]]:
        """Make the staging folder, which `stack` puts in place or removes; say its name, and who writes what.

        Raises:
            CheckpointError: the disk refused or is too full, or ranks differ in what they should have in common.
        """
        self._compare([digests for _, digests in offers])
        with dcp_faults(self.target, DOING):
            plans, self._metadata = self.planner.create_global_plan([plan for plan, _ in offers])
        with os_faults(CheckpointError, self.target, DOING):
            root = self.target.parent
            root.mkdir(parents=True, exist_ok=True)
            remove_stale(root)
            check_free_space(root, sum(map(_size, plans)), CheckpointError)
            self._staging = stack.enter_context(atomic_directory(self.target))
        return [(self._staging.name, plan) for plan in ReproducibleWriter(self._staging).prepare_global_plan(plans)]

    def put(self, staging: Path, plan: SavePlan) -> Written:
        """Write this rank's part, flushed to the disk.

        Raises:
            CheckpointError: the disk refused, or it is not the one that the first rank writes to.
        """
        if not staging.is_dir():
            raise CheckpointError(
                f"{staging.parent}: what the first rank makes there is not seen here; all ranks of a run need one "
                "file system"
            )
        with dcp_faults(self.target, DOING):
            results = ReproducibleWriter(staging).write_data(self.planner.finish_plan(plan), self.planner).wait()
        with os_faults(CheckpointError, self.target, DOING):
            return results, {file.name: sha256(file) for file in staging.glob(f"__{self.ranks.rank}_*")}

    def finish(self, written: Sequence[Written], stack: ExitStack) -> None:
        """Add what is no rank's own, and put the state in place.

        Raises:
            CheckpointError: the disk refused.
        """
        with dcp_faults(self.target, DOING):
            ReproducibleWriter(self._staging).finish(self._metadata, [results for results, _ in written])
        with os_faults(CheckpointError, self.target, DOING):
            (self._staging / PROGRESS).write_text(self.progress, encoding="utf-8")
            sums = {name: sha256(self._staging / name) for name in (METADATA, PROGRESS)}
            for _, files in written:
                sums |= files
            (self._staging / CHECKSUMS).write_text(render(sums), encoding="utf-8")
            stack.close()

    def _compare(self, digests: Sequence[Mapping[str, str]]) -> None:
        """Refuse tensors under one name that are plain and not the same: only one of them would be written."""
        first: dict[str, tuple[int, str]] = {}
        for rank, found in enumerate(digests):
            for name, digest in found.items():
                other, expected = first.setdefault(name, (rank, digest))
                if digest != expected:
                    raise CheckpointError(
                        f"{self.target}: {name} is not the same on {self.ranks.name(other)} and "
                        f"{self.ranks.name(rank)}; what differs between ranks must be a DTensor"
                    )


def _size(plan: SavePlan) -> int:
    """Return what a plan needs on the disk, bytes."""
    parts = [item.tensor_data for item in plan.items if item.tensor_data is not None]
    return sum(prod(part.chunk.sizes) * part.properties.dtype.itemsize + TENSOR_OVERHEAD_BYTES for part in parts)
