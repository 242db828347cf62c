"""One optimizer step.

Legend: B sequences, S positions each, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.config import RunConfig
from abyssal.errors import TrainingError
from abyssal.model import Transformer
from abyssal.train.balancing import add_loads, max_violation, update_biases
from abyssal.train.guard import non_finite
from abyssal.train.objective import ObjectiveWeights, micro_batch_loss
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
) -> StepResult:
    """Accumulate the batch's gradients, clip, update the weights, then the balancing biases.

    Args:
        windows: [B, S + 1] token ids, the whole batch.
        tokens_seen: before this step; the schedules are functions of it.
        judge: takes loss and gradient norm, and says why the update is to be refused, or none.
        lengths: of each window, the inputs of one document after another, where none may see another document.

    Raises:
        RefusedUpdateError: `judge` refused; weights, moments and biases are as before.
    """
    total_tokens, schedule = config.train.tokens, config.schedule
    learning_rate = schedule.learning_rate.at(tokens_seen, total_tokens)
    sequences, positions = windows.shape[0], windows.shape[1] - 1
    weights = ObjectiveWeights(
        tokens=sequences * positions,
        sequences=sum(map(len, lengths)) or sequences,
        mtp=schedule.mtp_weight.at(tokens_seen, total_tokens),
        balance=config.objective.balance_alpha,
    )
    main, mtp = torch.zeros(()), [torch.zeros(()) for _ in model.mtp_modules]
    loads: dict[int, Tensor] = {}
    balance: list[Tensor] = []
    optimizer.zero_grad()
    size = config.train.micro_batch_size
    for first, micro_batch in zip(range(0, sequences, size), windows.split(size), strict=True):
        part = micro_batch_loss(model, micro_batch, weights, lengths[first : first + size])
        part.total.backward()
        main = main + part.main.cpu()
        mtp = [a + b.cpu() for a, b in zip(mtp, part.mtp, strict=True)]
        add_loads(loads, part.statistics.expert_load)
        balance += [value.cpu() for value in part.statistics.balance_loss.values()]
    norm = clip_gradients(model, config.optimizer.max_grad_norm).item()
    loss = main.item() / weights.tokens
    if reason := judge(loss, norm):
        raise RefusedUpdateError(reason, loss, norm)
    optimizer.step(learning_rate)
    update_biases(model, loads, schedule.bias_update_speed.at(tokens_seen, total_tokens))
    return StepResult(
        loss=loss,
        mtp_losses=tuple(value.item() / weights.tokens for value in mtp),
        balance_loss=torch.stack(balance).mean().item() if balance else 0.0,
        gradient_norm=norm,
        learning_rate=learning_rate,
        max_violation=max_violation(loads),
        expert_load={layer: load.tolist() for layer, load in loads.items()},
    )
