"""Whatever befalls one of the ranks that write or read a state: all learn of it, and no state is ever half there."""

from __future__ import annotations

import errno
import itertools
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from abyssal.checkpoint.state import StateWriter, check_state, latest_state, load_state, save_state, states
from abyssal.ranks import ranks as ranks_module
from ranks import run_ranks

pytestmark = pytest.mark.slow

WORLD = 3
WRITE = "checkpoint.state.save.ReproducibleWriter.write_data"
#: Where a write can fail, and the ranks that come there.
POINTS = {
    WRITE: (0, 1, 2),
    "checkpoint.state.save.sha256": (0, 1, 2),
    "checkpoint.state.save.check_free_space": (0,),
    "checkpoint.state.save.ReproducibleWriter.finish": (0,),
    "files.atomic.flush_tree": (0,),
    "files.atomic._put_in_place": (0,),
}


def start() -> dist.ProcessGroup:
    dist.init_process_group("gloo")
    return dist.new_group(backend="gloo")


def content(value: float) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = torch.full((7, 2), value)
    return {"model": {"rows": distribute_tensor(rows, mesh, [Shard(0)])}, "count": torch.tensor(value)}


def plain(value: float) -> dict[str, Any]:
    return {"model": {"rows": torch.full((7, 2), value)}, "count": torch.tensor(value)}


def failing(point: str, effect: Any) -> Any:
    return mock.patch(f"abyssal.{point}", side_effect=effect)


def told(action: Callable[[], Any]) -> str:
    """Return what an action raises, and as what."""
    try:
        action()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def fail_everywhere(root: Path) -> list[tuple[str, int, str, str]]:
    """Let each rank fail at each point, and every time write a state after it; return what was told here."""
    group = start()
    steps, found = itertools.count(2), []
    save_state(root, 1, content(1.0), {"step": 1}, keep=1, group=group)
    for error in (OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()):
        for point, rank in [(point, rank) for point, ranks in POINTS.items() for rank in ranks]:
            step, before = next(steps), names(root)
            with failing(point, error) if dist.get_rank() == rank else nullcontext():
                sentence = told(lambda: save_state(root, step, content(1.0), {}, keep=1, group=group))  # noqa: B023
            dist.barrier()
            assert names(root) == before, point
            dist.barrier()
            save_state(root, step, content(step), {"step": step}, keep=1, group=group)
            found.append((point, rank, type(error).__name__, sentence))
    return found


def test_fault_of_one_rank_is_told_on_all_and_leaves_no_state(tmp_path: Path) -> None:
    results = run_ranks(WORLD, fail_everywhere, tmp_path)
    for here, found in enumerate(results):
        assert len(found) == 20
        for point, rank, error, sentence in found:
            if error == "OSError":
                assert sentence.startswith(f"CheckpointError: rank {rank}: {tmp_path}/step-000000"), point
                assert "cannot write the training state (No space left; free some space" in sentence, point
            elif here == rank:
                assert sentence == "KeyboardInterrupt: ", point
            else:
                assert sentence == f"RankError: rank {rank}: KeyboardInterrupt: ", point
    assert names(tmp_path) == ["step-00000021"]
    check_state(tmp_path / "step-00000021")


# Ranks that say nothing any more


def die(root: Path, point: str, rank: int) -> str:
    """Write two states; a rank is killed at a point of the second, half its part written."""
    group = start()
    save_state(root, 1, content(1.0), {"step": 1}, keep=2, group=group)

    def kill(*_: Any) -> None:
        for staging in root.glob(".*.writing-*"):
            (staging / f"__{rank}_0.distcp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    with failing(point, kill) if dist.get_rank() == rank else nullcontext():
        return told(lambda: save_state(root, 2, content(2.0), {"step": 2}, keep=1, group=group))


def start_again(root: Path) -> int:
    """Load the newest state, and write another."""
    group = start()
    newest, tensors = latest_state(root, group=group), content(0.0)
    assert newest is not None
    step = load_state(newest, tensors, group=group)["step"]
    assert tensors["model"]["rows"].full_tensor().unique().tolist() == [step]
    save_state(root, 3, content(3.0), {"step": 3}, keep=2, group=group)
    return step


@pytest.mark.parametrize(
    ("point", "rank", "newest"),
    [
        (WRITE, 1, 1),
        (WRITE, 0, 1),
        ("checkpoint.state.save.sha256", 2, 1),
        ("files.atomic._put_in_place", 0, 1),
        ("checkpoint.state.save.remove_state", 0, 2),  # the new state is in its place, the old one not removed
    ],
)
def test_killed_rank_leaves_the_old_state_or_the_new_one(tmp_path: Path, point: str, rank: int, newest: int) -> None:
    told_by = run_ranks(WORLD, die, tmp_path, point, rank, dying={rank})
    assert told_by.pop(rank) is None
    gone = f"RankError: rank {rank}: its process ended, or "
    assert [sentence[: len(gone)] for sentence in told_by] == [gone] * (WORLD - 1)
    assert int(states(tmp_path)[-1].name[5:]) == newest
    assert run_ranks(WORLD, start_again, tmp_path) == [newest] * WORLD
    assert names(tmp_path) == [f"step-{newest:08d}", "step-00000003"], "what was left half-written is there still"


def fall_silent(root: Path) -> str:
    """Write a state without rank 1, for which rank 0 does not wait long."""
    group = start()
    if dist.get_rank() == 0:
        ranks_module.TIMEOUT_S = 0.5
    if dist.get_rank() == 1:
        dist.barrier()
        return "silent"
    sentence = told(lambda: save_state(root, 1, plain(1.0), {}, keep=1, group=group))
    dist.barrier()
    return sentence


def test_silent_rank_is_named_by_the_first(tmp_path: Path) -> None:
    first, silent, third = run_ranks(WORLD, fall_silent, tmp_path)
    assert first == "RankError: rank 1: gives no answer; resume from the newest training state"
    assert third.startswith("RankError: rank 0: its process ended, or it gave up waiting for another rank")
    assert (silent, states(tmp_path)) == ("silent", [])


# Ranks that disagree


def disagree(root: Path) -> list[str]:
    group, rank = start(), dist.get_rank()

    def save(folder: str, tensors: dict[str, Any]) -> str:
        return told(lambda: save_state(root / folder, 1, tensors, {}, keep=1, group=group))

    return [
        save("values", plain(float(rank == 2))),
        save("shapes", {"count": torch.zeros(2 + rank // 2)}),
        save("types", {"count": torch.zeros(2, dtype=torch.float64 if rank == 2 else torch.float32)}),
        save(f"disk-{rank}", plain(1.0)),
    ]


def test_plain_tensors_and_disks_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    results = run_ranks(WORLD, disagree, tmp_path)
    assert len({str(sentences) for sentences in results}) == 1
    *unequal, disk = results[0]
    for sentence, name in zip(unequal, ("model.rows", "count", "count"), strict=True):
        assert f"{name} is not the same on rank 0 and rank 2; what differs between ranks must be a DTensor" in sentence
    assert "disk-1/step-00000001: what the first rank makes there is not seen here; all ranks of a run need one" in disk
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def hold_stages(root: Path) -> list[Any]:
    """Ranks hold tensors of different names, as the stages of a pipeline do, and one that all have."""
    group, rank = start(), dist.get_rank()

    def held(value: float) -> dict[str, torch.Tensor]:
        return {f"stage.{rank}": torch.full((rank + 1,), value + rank), "shared": torch.full((2,), value)}

    save_state(root, 1, held(5.0), {"step": 1}, keep=1, group=group)
    target = held(0.0)
    load_state(root / "step-00000001", target, group=group)
    own = [tensor.tolist() for tensor in target.values()]
    more = {**held(0.0), **({"other": torch.zeros(1)} if rank == 1 else {})}
    less = {name: tensor for name, tensor in held(0.0).items() if name != "stage.2"}
    return [
        own,
        told(lambda: load_state(root / "step-00000001", more, group=group)),
        told(lambda: load_state(root / "step-00000001", less, group=group)),
    ]


def test_ranks_may_hold_different_tensors_that_together_fit_the_state(tmp_path: Path) -> None:
    results = run_ranks(WORLD, hold_stages, tmp_path)
    assert [own for own, *_ in results] == [[[5.0 + rank] * (rank + 1), [5.0, 5.0]] for rank in range(WORLD)]
    for _, more, less in results:
        assert "of another model or optimizer; missing: other; resume" in more
        assert "of another model or optimizer; surplus: stage.2; resume" in less


# Damage


def read_damaged(root: Path, files: list[str]) -> list[str]:
    group, rank = start(), dist.get_rank()
    path = save_state(root, 1, content(1.0), {"step": 1}, keep=1, group=group)
    found = []
    for name in files:
        whole = (path / name).read_bytes()
        dist.barrier()
        if rank == 0:
            middle = len(whole) // 2
            (path / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        dist.barrier()
        tensors = content(0.0)
        found.append(told(lambda: load_state(path, tensors, group=group)))  # noqa: B023
        assert tensors["model"]["rows"].full_tensor().unique().tolist() == [0.0], "values of a damaged state were taken"
        dist.barrier()
        if rank == 0:
            (path / name).write_bytes(whole)
        dist.barrier()
    assert load_state(path, content(0.0), group=group) == {"step": 1}
    return found


def test_damage_found_by_one_rank_is_told_on_all(tmp_path: Path) -> None:
    files = ["__0_0.distcp", "__1_0.distcp", "__2_0.distcp", ".metadata", "progress.json", "checksums.json"]
    results = run_ranks(WORLD, read_damaged, tmp_path, files)
    assert len({str(found) for found in results}) == 1
    for name, sentence in zip(files, results[0], strict=True):
        assert f"/step-00000001/{name}: damaged" in sentence


# The writer beside the run


def write_beside(root: Path) -> list[Any]:
    """Ask for states while the ranks speak over the group that they train with; one fails on rank 1."""
    group, rank = start(), dist.get_rank()
    counted = torch.zeros(1)

    def steps_until_told(writer: StateWriter) -> tuple[int, str]:
        for step in itertools.count():
            dist.all_reduce(counted)
            if (sentence := told(writer.check)) != "nothing":
                return step, sentence
        raise AssertionError

    found: list[Any] = []
    with StateWriter(root, keep=2, keep_multiples_of=20, group=group) as writer:
        for step in range(10, 80, 10):
            writer.save(step, content(step), {"step": step})
            for _ in range(step // 10):
                dist.all_reduce(counted)
                writer.check()
        found.append((writer.has(70), writer.has(71)))
        for call in ("check", "wait", "has", "save"):
            with failing(WRITE, OSError(28, "Full")) if rank == 1 else nullcontext():
                writer.save(80, content(80), {"step": 80})
                assert writer._thread is not None
                if call == "check":
                    found.append(steps_until_told(writer))
                    continue
                writer._thread.join()
            arguments = {"wait": (), "has": (80,), "save": (90, content(90), {})}[call]
            found.append(told(lambda: getattr(writer, call)(*arguments)))  # noqa: B023
        writer.save(90, content(90), {"step": 90})
    return found


def test_writers_of_all_ranks_tell_a_fault_at_the_same_call(tmp_path: Path) -> None:
    results = run_ranks(WORLD, write_beside, tmp_path)
    assert len({str(found) for found in results}) == 1, "a rank would have gone on alone"
    exists, (_, at_check), *others = results[0]
    assert exists == (True, False)
    for sentence in (at_check, *others):
        assert sentence.startswith(f"CheckpointError: rank 1: {tmp_path}/step-00000080: cannot write"), sentence
    assert [int(path.name[5:]) for path in states(tmp_path)] == [20, 40, 60, 70, 90]


def fail_at_the_end(root: Path) -> str:
    group = start()

    def run() -> None:
        with StateWriter(root, keep=1, group=group) as writer:
            writer.save(1, content(1.0), {})

    with failing(WRITE, OSError(28, "Full")) if dist.get_rank() == 2 else nullcontext():
        return told(run)


def test_fault_of_the_last_write_is_told_on_all(tmp_path: Path) -> None:
    first, *others = run_ranks(WORLD, fail_at_the_end, tmp_path)
    assert "rank 2" in first
    assert others == [first] * (WORLD - 1)
