"""Runs of `abyssal train` that are interrupted and go on at another number of ranks, and what they held and read."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ranks import run_ranks
from ranks.training import (
    Run,
    changes,
    forget_meshes,
    leave_out_what_no_test_needs,
    options,
    read_metrics,
    whole,
    write_corpus,
)


@dataclass(frozen=True)
class Line:
    """One command line: a run that begins, or one that goes on in its folder with other fields."""

    out: Path
    fields: dict[str, Any]
    resumed: bool = False
    stopped_after: int = 0  # the step after which the last rank is sent SIGTERM; 0: none


@dataclass
class Seen:
    """What a command line held and read; of a rank, or of all together."""

    restored: dict[str, str] = field(default_factory=dict)  # digests of whole tensors, as loaded; none: began anew
    saved: dict[str, str] = field(default_factory=dict)  # the same of the last training state that was written
    windows: list[list[str]] = field(default_factory=list)  # digests of every sequence of each step


def run_lines(world_size: int, folder: Path, lines: Mapping[str, Line]) -> dict[str, tuple[Run, Seen]]:
    """Run each line on as many gloo ranks, in the same processes; corpus and data are those of `folder`."""
    write_corpus(folder)
    arguments = {
        name: [
            *("train", "demo", "--out", str(line.out)),
            *(["--resume", *changes(line.fields)] if line.resumed else options(folder, line.fields)),
        ]
        for name, line in lines.items()
    }
    parts = run_ranks(world_size, _run, arguments, {name: line.stopped_after for name, line in lines.items()})
    return {
        name: (Run(read_metrics(line.out), {}), _together([part[name] for part in parts]))
        for name, line in lines.items()
    }


def _together(parts: list[Seen]) -> Seen:
    """Put the shares of the batches beside one another, in the order of the ranks."""
    steps = zip(*(part.windows for part in parts), strict=True)
    return Seen(parts[0].restored, parts[0].saved, [[window for share in step for window in share] for step in steps])


def _run(arguments: dict[str, list[str]], stopped_after: dict[str, int]) -> dict[str, Seen]:
    from abyssal.cli.main import main

    leave_out_what_no_test_needs()
    found: dict[str, Seen] = {}
    for name, line in arguments.items():
        found[name] = _watch(stopped_after[name])
        forget_meshes()
        assert main(line) == (128 + signal.SIGTERM if stopped_after[name] else 0), line
        if dist.is_initialized():  # as after a signal, where a process ends
            dist.destroy_process_group()
    return found


def _watch(stopped_after: int) -> Seen:
    """Return what the next run of this process fills, and let it be stopped."""
    from abyssal.train import loop
    from abyssal.train.training_state import TrainingState

    seen = Seen()

    class Watched(TrainingState):
        def restore(self, path: Path | None) -> None:
            super().restore(path)
            if path is not None:
                seen.restored = _digests(self.tensors)

        def record(self) -> dict[str, Any]:
            seen.saved = _digests(self.tensors)
            return super().record()

        def next_batch(self, loader: Any) -> Any:
            batch = super().next_batch(loader)
            seen.windows.append([_digest(window) for window in batch.tokens])
            return batch

        def accept(self, sequences: int, result: Any) -> None:
            super().accept(sequences, result)
            if self.progress.step == stopped_after and self.ranks.rank == self.ranks.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    loop.TrainingState = Watched  # type: ignore[misc]
    return seen


def _digests(tensors: Any, prefix: str = "") -> dict[str, str]:
    """Return the digest of every tensor of nested dicts, all of it, by dotted name; called by all ranks."""
    if isinstance(tensors, Tensor):
        return {prefix: _digest(whole(tensors))}
    return {key: value for name, part in tensors.items() for key, value in _digests(part, f"{prefix}.{name}").items()}


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"
