"""Muon on many ranks is Muon in one process, and so are its states, in whatever layout they are written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from abyssal.checkpoint.pieces import leaves
from abyssal.checkpoint.state import save_state
from abyssal.config import RunConfig, load_recipe
from abyssal.parallel.mesh import Mesh
from abyssal.parallel.ranks import Ranks
from abyssal.train.setup import fit
from abyssal.train.step import train_step
from abyssal.train.training_state import TrainingState
from ranks import run_ranks
from ranks.spread import SHAPE

SEQUENCES, POSITIONS, STEPS, SAVED = 8, 12, 6, 3
FIELDS = {
    **{f"model.{name}": value for name, value in SHAPE.items()},
    "train.sequence_length": POSITIONS,
    "train.micro_batch_size": 2,
    "train.tokens": 20 * SEQUENCES * POSITIONS,
    "schedule.batch_size.start": SEQUENCES,
}
#: Of four ranks: recipe fields.
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep 2 * edp 2": {"parallel.ep_size": 2},
    "dp 4": {},
    "dp 4, ZeRO-3": {"parallel.zero_stage": 3},
    "ep 4": {"parallel.ep_size": 4, "parallel.zero_stage": 2},
    "dp_replicate 2 * edp 2": {"parallel.dp_replicate_size": 2},
    "dp_replicate 2 * ep 2": {"parallel.dp_replicate_size": 2, "parallel.ep_size": 2},
}


class Run:
    """A small run with Muon, and what it did; each rank has a share of every batch."""

    def __init__(self, dtype: str, layout: dict[str, Any], ranks: Ranks) -> None:
        fields = FIELDS | layout | {"train.compute_dtype": dtype}
        self.config: RunConfig = load_recipe("demo", [f"{name}={value}" for name, value in fields.items()])
        assert self.config.optimizer.name == "muon"
        device, placed = torch.device("cpu"), fit(self.config, ranks)
        mesh = Mesh.over(placed, device) if ranks.world_size > 1 else None
        self.ranks, self.state = ranks, TrainingState(self.config, device, ranks, mesh)

    def train(self, until: int) -> list[float]:
        """Make the steps that are left until then; returns their losses."""
        state, losses = self.state, []
        while state.progress.step < until:
            generator = torch.Generator().manual_seed(state.progress.step)
            vocabulary = self.config.model.vocab_size
            windows = torch.randint(vocabulary, (SEQUENCES, POSITIONS + 1), generator=generator)
            share = windows.chunk(self.ranks.world_size)[self.ranks.rank]
            seen = state.progress.tokens
            result = train_step(state.model, state.optimizer, share, self.config, seen, ranks=self.ranks)
            state.accept(SEQUENCES, result)
            losses.append(result.loss)
        return losses

    def whole(self) -> dict[str, Tensor]:
        """Return a copy of all weights and moments, put together."""
        named = ((".".join(path), tensor) for path, tensor in leaves(self.state.tensors))
        return {n: t.full_tensor() if isinstance(t, DTensor) else t.detach().clone() for n, t in named}


def _train(root: Path, dtype: str) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """Train in every layout from the beginning; write the state of the first one on the way."""
    dist.init_process_group("gloo")
    ranks, found = Ranks.joined(), {}
    for name, layout in LAYOUTS.items():
        run = Run(dtype, layout, ranks)
        losses = run.train(SAVED)
        if not found:
            save_state(root, SAVED, run.state.tensors, run.state.record(), keep=1, group=ranks.control)
            saved = run.whole()
        found[name] = losses + run.train(STEPS), run.whole()
    if ranks.is_first:
        torch.save(saved, root / "saved.pt")
    return _numbers(found)


def _go_on(root: Path, dtype: str) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """Read that state in every layout: it must be equal to the bit; train on."""
    dist.init_process_group("gloo")
    ranks, found, saved = Ranks.joined(), {}, torch.load(root / "saved.pt")
    for name, layout in LAYOUTS.items():
        run = Run(dtype, layout, ranks)
        found[name] = go_on(run, root, saved)
    return _numbers(found)


def go_on(run: Run, root: Path, saved: dict[str, Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    run.state.restore(root / f"step-{SAVED:08d}")
    read = run.whole()
    assert read.keys() == saved.keys()
    assert sum(name.endswith("momentum") for name in read) > 20
    assert not [name for name in saved if not torch.equal(read[name], saved[name])]
    return run.train(STEPS), run.whole()


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Make tensors fit to leave the process."""
    return {name: (losses, {n: t.numpy() for n, t in whole.items()}) for name, (losses, whole) in found.items()}


def compare(what: str, losses: list[float], whole: dict[str, Any], expected: Any, limit: float) -> None:
    """Hold losses, weights and moments against those of one process, by norm."""
    theirs, tensors = expected
    assert len(losses) > 2
    for ours, other in zip(losses, theirs[-len(losses) :], strict=True):
        assert abs(ours - other) <= limit * other, (what, losses, theirs)
    assert whole.keys() == tensors.keys()
    for name, tensor in tensors.items():
        error = (torch.as_tensor(whole[name]).double() - tensor.double()).norm()
        assert error <= limit * tensor.double().norm(), (what, name, error / tensor.double().norm())


def test_every_layout_trains_with_muon_as_one_process_and_goes_on_from_the_state_of_another(tmp_path: Path) -> None:
    alone = Run("float64", {}, Ranks())
    expected = alone.train(STEPS), alone.whole()
    for name, (losses, whole) in run_ranks(4, _train, tmp_path, "float64")[0].items():
        compare(name, losses, whole, expected, 1e-9)
    for name, (losses, whole) in run_ranks(4, _go_on, tmp_path, "float64")[0].items():
        compare(f"on from {name}", losses, whole, expected, 1e-9)
    losses, whole = go_on(Run("float64", {}, Ranks()), tmp_path, torch.load(tmp_path / "saved.pt"))
    compare("on in one process", losses, whole, expected, 1e-9)
