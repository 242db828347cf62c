"""One optimizer step: the batch's gradients, the clip, the update, and last the balancing biases.

Legend: B sequences, S positions each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.config import RunConfig
from abyssal.errors import TrainingError
from abyssal.model import Transformer
from abyssal.ranks.ranks import ALONE, Ranks
from abyssal.train.balancing import max_violation, update_biases
from abyssal.train.executor import Executor, run_in_turn
from abyssal.train.guard import non_finite
from abyssal.train.objective import MicroBatch, NextTokenObjective
from abyssal.train.optimizer import Optimizers, clip_gradients


@dataclass(frozen=True)
class StepResult:
    """What one step measured; losses in nats a token."""

    loss: float
    mtp_losses: tuple[float, ...]
    balance_loss: float  # mean over MoE layers and sequences, 1 at perfect balance
    gradient_norm: float  # before clipping
    learning_rate: float
    max_violation: float
    expert_load: dict[int, list[int]]  # layer -> tokens sent to each expert


class RefusedUpdateError(TrainingError):
    """This step's update was not applied; weights, moments and biases are as before it."""

    def __init__(self, reason: str, loss: float, gradient_norm: float) -> None:
        """Keep what was seen; `reason` is a clause for people."""
        super().__init__(f"{reason}; this update was not applied")
        self.reason, self.loss, self.gradient_norm = reason, loss, gradient_norm


def train_step(
    model: Transformer,
    optimizer: Optimizers,
    windows: Tensor,
    config: RunConfig,
    tokens_seen: int,
    *,
    judge: Callable[[float, float], str | None] = non_finite,
    lengths: Sequence[Sequence[int]] = (),
    ranks: Ranks = ALONE,
    execute: Executor = run_in_turn,
) -> StepResult:
    """Accumulate the batch's gradients, clip, update the weights, then the balancing biases.

    Args:
        windows: [B, S + 1] token ids, the whole batch, or this rank's share of it, as large as any other's.
        tokens_seen: before this step; the schedules are functions of it.
        judge: takes loss and gradient norm, and says why the update is to be refused, or none.
        lengths: of each window, the inputs of one document after another, where none may see another document.
        ranks: that make this step together, each with the same model, optimizer and settings.
        execute: runs the micro-batches.

    Raises:
        RefusedUpdateError: `judge` refused; weights, moments and biases are as before.
    """
    total_tokens, schedule = config.train.tokens, config.schedule
    sequences, positions = windows.shape[0], windows.shape[1] - 1
    documents = ranks.sum(torch.tensor(sum(map(len, lengths)))).item() if lengths else sequences * ranks.world_size
    objective = NextTokenObjective(
        tokens=sequences * positions * ranks.world_size,
        sequences=int(documents),
        mtp=schedule.mtp_weight.at(tokens_seen, total_tokens),
        balance=config.objective.balance_alpha,
    )
    size = config.train.micro_batch_size
    micro_batches = [
        MicroBatch(part, lengths[first : first + size])
        for first, part in zip(range(0, sequences, size), windows.split(size), strict=True)
    ]
    optimizer.zero_grad()
    sums = execute(model, objective, micro_batches, config.parallel, ranks)
    ranks.mark("gradient norm")
    totals = sums.read(clip_gradients(model, config.optimizer.max_grad_norm, ranks), ranks)
    loss = totals.losses["main"] / objective.tokens
    if reason := judge(loss, totals.gradient_norm):
        raise RefusedUpdateError(reason, loss, totals.gradient_norm)
    ranks.mark("update of the weights")
    learning_rate = schedule.learning_rate.at(tokens_seen, total_tokens)
    optimizer.step(learning_rate)
    update_biases(model, totals.loads, schedule.bias_update_speed.at(tokens_seen, total_tokens))
    return StepResult(
        loss=loss,
        mtp_losses=tuple(value / objective.tokens for name, value in totals.losses.items() if name != "main"),
        balance_loss=totals.balance_loss,
        gradient_norm=totals.gradient_norm,
        learning_rate=learning_rate,
        max_violation=max_violation(totals.loads),
        expert_load={layer: load.tolist() for layer, load in totals.loads.items()},
    )
