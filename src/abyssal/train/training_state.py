"""Everything of a run that changes, saved and restored whole: weights, moments, biases, average, counts, guard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from abyssal.checkpoint.state import load_state, named_tensors, remove_state, states, step_of
from abyssal.config import RunConfig
from abyssal.data.batch import Batch, BatchLoader
from abyssal.errors import TrainingError
from abyssal.ranks.ranks import ALONE, Ranks
from abyssal.train.average import WeightAverage
from abyssal.train.build import build_run, fill_weights
from abyssal.train.guard import Guard
from abyssal.train.progress import Progress
from abyssal.train.step import RefusedUpdateError, StepResult


class TrainingState:
    """The live state of a run; `tensors` and `record()` are what a training state on disk holds of it."""

    def __init__(self, config: RunConfig, device: torch.device, ranks: Ranks = ALONE) -> None:
        """Build the state of a run that begins, or this rank's part of it."""
        run = build_run(config, device, ranks)
        self.config, self.ranks, self.layout = config, ranks, run.layout
        self.model, self.optimizer = run.model, run.optimizer
        self.weights = self.model.state_dict()  # the live tensors
        self.average = WeightAverage(self.weights, config.ema.decay) if config.ema.decay else None
        self.progress, self.guard = Progress(), Guard()
        moments = self.optimizer.tensors(dict(self.model.named_parameters()))
        self.tensors: dict[str, Any] = {"model": self.weights, "optimizer": moments}
        if self.average is not None:
            self.tensors["ema"] = self.average.tensors

    def record(self) -> dict[str, Any]:
        """Return what is no tensor, as JSON: counts, guard, and the recipe, with which a resumed run is compared."""
        recipe = self.config.model_dump(mode="json", exclude_none=True)
        return {**self.progress.to_json(), "guard": self.guard.to_json(), "recipe": recipe}

    def restore(self, path: Path | None) -> None:
        """Take the state of `path`, or that of a run that begins.

        Raises:
            CheckpointError: the state is damaged, or of another model or optimizer.
        """
        if path is not None:
            record = load_state(path, self.tensors, group=self.ranks.control)
            self.progress, self.guard = Progress.from_json(record), Guard.from_json(record.get("guard"))
            return
        fill_weights(self.model, self.config)
        for _, tensor in named_tensors(self.tensors["optimizer"]):
            tensor.zero_()
        if self.average is not None:
            self.average.reset(self.weights)
        self.progress, self.guard = Progress(), Guard()

    def next_batch(self, loader: BatchLoader) -> Batch:
        """Return this rank's share of the batch that comes next, without the skipped sequences."""
        size = self.config.batch_size_at(self.progress.tokens)
        share = (self.ranks.rank, self.ranks.world_size)
        return loader.skipping(self.guard.skipped).batch(self.progress.sequences, size, share)

    def judge(self, loss: float, gradient_norm: float) -> str | None:
        """Return why an update with these is to be refused, none where it is not."""
        return self.guard.judge(self.config.guard, loss, gradient_norm)

    def accept(self, sequences: int, result: StepResult) -> None:
        """Count the step of so many sequences that was just made."""
        self.progress = self.progress.after(sequences, self.config.train.sequence_length)
        self.guard = self.guard.accepting(self.config.guard, result.loss, result.gradient_norm)
        if self.average is not None:
            self.average.update(self.weights, self.progress.step)

    def refuse(self, batch: Batch) -> None:
        """Step over a batch whose update was refused."""
        self.guard = self.guard.refusing(self.config.guard, self.progress.step + 1, batch.ranges)

    def roll_back(self, root: Path, loader: BatchLoader, last: RefusedUpdateError) -> None:
        """Go back to the newest training state from before the trouble, and step over what caused it.

        Without such a state it is the oldest one that there is, and without any the beginning. States of later steps
        are removed, newest first: a run that is killed meanwhile meets the same trouble again, and goes the same way.

        Args:
            root: the folder of the training states, none of which is being written.
            loader: of the run's sequences.
            last: the last refusal.

        Raises:
            TrainingError: the run went back too often already.
        """
        trouble, limits = self.guard, self.config.guard
        saved = states(root, group=self.ranks.control)
        if len(trouble.rollbacks) >= limits.max_rollbacks:
            raise TrainingError(
                f"step {self.progress.step + 1}: {last}; {len(trouble.refusals)} batches in {limits.rollback_steps} "
                f"steps were refused, and the run went back {len(trouble.rollbacks)} times already, which "
                f"guard.max_rollbacks={limits.max_rollbacks} allows no more"
            )
        before = [path for path in saved if step_of(path) < trouble.refusals[0].step]
        target = before[-1] if before else saved[0] if saved else None
        for path in reversed(saved):
            if path == target:
                break
            remove_state(path, group=self.ranks.control)
        self.restore(target)
        next_sequence = self.next_batch(loader).ranges[0][0]
        self.guard = trouble.rolled_back(self.guard, self.progress.step, next_sequence)
