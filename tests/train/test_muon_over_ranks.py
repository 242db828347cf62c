"""Muon on many ranks is Muon in one process, and so are its states, in whatever layout they are written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from abyssal.checkpoint.state import named_tensors, save_state
from abyssal.config import RunConfig, load_recipe
from abyssal.ranks.ranks import Ranks
from abyssal.train.step import train_step
from abyssal.train.training_state import TrainingState
from ranks import run_ranks
from ranks.spread import SHAPE

pytestmark = pytest.mark.slow

Result = tuple[list[float], dict[str, Tensor]]

SEQUENCES, POSITIONS, STEPS, SAVED = 8, 12, 6, 3
FIELDS = {
    **{f"model.{name}": value for name, value in SHAPE.items()},
    "train.sequence_length": POSITIONS,
    "train.micro_batch_size": 2,
    "train.tokens": 20 * SEQUENCES * POSITIONS,
    "schedule.batch_size.start": SEQUENCES,
}
#: Of four ranks: recipe fields. The first one's state is read by the others.
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep 2 * edp 2": {"parallel.ep_size": 2},
    "dp 4, ZeRO-3": {"parallel.zero_stage": 3},
    "ep 4": {"parallel.ep_size": 4, "parallel.zero_stage": 2},
    "dp_replicate 2 * edp 2": {"parallel.dp_replicate_size": 2},
}
#: Of losses, weights and moments. In float64 so are the products. Otherwise they are taken of what was rounded to bf16,
#: and a gradient summed in another order goes up instead of down where it lies between two: 0.4% of one number.
LIMITS = {"float64": 1e-9, "float32": 5e-3}


class Run:
    """A small run with Muon, and what it did; each rank has a share of every batch."""

    def __init__(self, dtype: str, layout: dict[str, Any], ranks: Ranks) -> None:
        fields = FIELDS | layout | {"train.compute_dtype": dtype}
        self.config: RunConfig = load_recipe("demo", [f"{name}={value}" for name, value in fields.items()])
        assert self.config.optimizer.name == "muon"
        self.ranks, self.state = ranks, TrainingState(self.config, torch.device("cpu"), ranks)

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
        named = ((".".join(path), tensor) for path, tensor in named_tensors(self.state.tensors))
        return {n: t.full_tensor() if isinstance(t, DTensor) else t.detach().clone() for n, t in named}


def _train(root: Path) -> None:
    """Train in every layout from the beginning, in the last one in fp32 too; write the first one's state on the way."""
    dist.init_process_group("gloo")
    ranks, found = Ranks.of_world(), {}
    for name, layout in LAYOUTS.items():
        run = Run("float64", layout, ranks)
        losses = run.train(SAVED)
        if not found:
            save_state(root, SAVED, run.state.tensors, run.state.record(), keep=1, group=ranks.control)
            saved = run.whole()
        found[name] = losses + run.train(STEPS), run.whole()
    run = Run("float32", layout, ranks)
    found["float32"] = run.train(STEPS), run.whole()
    if ranks.is_first:
        torch.save(saved, root / "saved.pt")
        torch.save(found, root / "trained.pt")


def _go_on(root: Path) -> None:
    """Read that state in other layouts, and train on."""
    dist.init_process_group("gloo")
    ranks, found, saved = Ranks.of_world(), {}, torch.load(root / "saved.pt")
    for name in list(LAYOUTS)[1:]:
        found[name] = go_on(Run("float64", LAYOUTS[name], ranks), root, saved)
    if ranks.is_first:
        torch.save(found, root / "gone on.pt")


def go_on(run: Run, root: Path, saved: dict[str, Tensor]) -> Result:
    """Read that state, which must be equal to the bit, and train on."""
    run.state.restore(root / f"step-{SAVED:08d}")
    read = run.whole()
    assert read.keys() == saved.keys()
    assert sum(name.endswith("momentum") for name in read) > 20
    assert not [name for name in saved if not torch.equal(read[name], saved[name])]
    return run.train(STEPS), run.whole()


def compare(what: str, result: Result, expected: Result, limit: float) -> None:
    """Hold losses, weights and moments against those of one process, by norm."""
    (losses, whole), (theirs, tensors) = result, expected
    assert len(losses) > 2
    for ours, other in zip(losses, theirs[-len(losses) :], strict=True):
        assert abs(ours - other) <= limit * other, (what, losses, theirs)
    assert whole.keys() == tensors.keys()
    for name, tensor in tensors.items():
        error = (whole[name] - tensor).norm() / tensor.norm() if tensor.any() else whole[name].norm()
        assert error <= limit, (what, name, error)


def test_every_layout_trains_with_muon_as_one_process_and_goes_on_from_the_state_of_another(tmp_path: Path) -> None:
    alone = {dtype: Run(dtype, {}, Ranks()) for dtype in LIMITS}
    expected = {dtype: (run.train(STEPS), run.whole()) for dtype, run in alone.items()}
    run_ranks(4, _train, tmp_path)
    for name, result in torch.load(tmp_path / "trained.pt").items():
        dtype = name if name in LIMITS else "float64"
        compare(name, result, expected[dtype], LIMITS[dtype])
    run_ranks(4, _go_on, tmp_path)
    results = torch.load(tmp_path / "gone on.pt")
    results["one process"] = go_on(Run("float64", {}, Ranks()), tmp_path, torch.load(tmp_path / "saved.pt"))
    for name, result in results.items():
        compare(f"on in {name}", result, expected["float64"], LIMITS["float64"])
