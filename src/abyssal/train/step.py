"""One optimizer step.

Legend: B sequences, S positions each, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from abyssal.config import RunConfig
from abyssal.errors import TrainingError
from abyssal.model import Transformer
from abyssal.parallel.apply import begin_micro_batch, begin_step, end_step
from abyssal.ranks.ranks import ALONE, Ranks
from abyssal.train.balancing import add_loads, max_violation, update_biases
from abyssal.train.guard import non_finite
from abyssal.train.objective import MicroBatchLoss, ObjectiveWeights, micro_batch_loss
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
) -> StepResult:
    """Accumulate the batch's gradients, clip, update the weights, then the balancing biases.

    Args:
        windows: [B, S + 1] token ids, the whole batch, or this rank's share of it, as large as any other's.
        tokens_seen: before this step; the schedules are functions of it.
        judge: takes loss and gradient norm, and says why the update is to be refused, or none.
        lengths: of each window, the inputs of one document after another, where none may see another document.
        ranks: that make this step together, each with the same model, optimizer and settings.

    Raises:
        RefusedUpdateError: `judge` refused; weights, moments and biases are as before.
    """
    total_tokens, schedule = config.train.tokens, config.schedule
    learning_rate = schedule.learning_rate.at(tokens_seen, total_tokens)
    sequences, positions = windows.shape[0], windows.shape[1] - 1
    documents = ranks.sum(torch.tensor(sum(map(len, lengths)))).item() if lengths else sequences * ranks.world_size
    weights = ObjectiveWeights(
        tokens=sequences * positions * ranks.world_size,
        sequences=int(documents),
        mtp=schedule.mtp_weight.at(tokens_seen, total_tokens),
        balance=config.objective.balance_alpha,
    )
    seen = _Seen.nothing(len(model.mtp_modules))
    optimizer.zero_grad()
    size = config.train.micro_batch_size
    begin_step(model, config.parallel)
    for first, micro_batch in zip(range(0, sequences, size), windows.split(size), strict=True):
        begin_micro_batch(model, config.parallel, last=first + size >= sequences)
        part = micro_batch_loss(model, micro_batch, weights, lengths[first : first + size])
        part.total.backward()
        seen.add(part)
    end_step(model)
    norm = clip_gradients(model, config.optimizer.max_grad_norm, ranks).item()
    seen.sum_over(ranks)
    loss, loads = seen.main.item() / weights.tokens, seen.loads
    if reason := judge(loss, norm):
        raise RefusedUpdateError(reason, loss, norm)
    optimizer.step(learning_rate)
    update_biases(model, loads, schedule.bias_update_speed.at(tokens_seen, total_tokens))
    return StepResult(
        loss=loss,
        mtp_losses=tuple(value.item() / weights.tokens for value in seen.mtp),
        balance_loss=seen.balance_loss,
        gradient_norm=norm,
        learning_rate=learning_rate,
        max_violation=max_violation(loads),
        expert_load={layer: load.tolist() for layer, load in loads.items()},
    )


@dataclass
class _Seen:
    """What the micro-batches of a step report, on the CPU."""

    main: Tensor  # [], summed over tokens
    mtp: list[Tensor]  # [] each
    loads: dict[int, Tensor] = field(default_factory=dict)
    balance: list[Tensor] = field(default_factory=list)  # [] each, one a layer and micro-batch

    @classmethod
    def nothing(cls, depth: int) -> Self:
        """Begin with `depth` MTP modules."""
        return cls(torch.zeros(()), [torch.zeros(()) for _ in range(depth)])

    def add(self, part: MicroBatchLoss) -> None:
        """Take in one micro-batch."""
        self.main = self.main + part.main.cpu()
        self.mtp = [a + b.cpu() for a, b in zip(self.mtp, part.mtp, strict=True)]
        add_loads(self.loads, part.statistics.expert_load)
        self.balance += [value.cpu() for value in part.statistics.balance_loss.values()]

    @property
    def balance_loss(self) -> float:
        """The mean over MoE layers and sequences."""
        return torch.stack(self.balance).mean().item() if self.balance else 0.0

    def sum_over(self, ranks: Ranks) -> None:
        """Replace this rank's sums by those of all ranks, whose shares are alike."""
        if ranks.world_size == 1:
            return
        layers = sorted(self.loads)
        balance = torch.tensor([self.balance_loss / ranks.world_size], dtype=torch.float64)
        loads = [self.loads[layer].cpu() for layer in layers]
        parts = [torch.stack([self.main, *self.mtp]), balance, *loads]
        sums = ranks.sum(torch.cat([part.to(torch.float64) for part in parts]))  # exact for counts of tokens
        losses, mean, *loads = sums.split([len(part) for part in parts])
        self.main, *self.mtp = losses.unbind()
        self.balance = [mean.squeeze()]
        self.loads = {layer: load.round().to(torch.int64) for layer, load in zip(layers, loads, strict=True)}
