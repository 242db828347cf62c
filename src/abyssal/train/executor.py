"""Micro-batches through the network, and the sums that a step needs of them. Nothing here reads the device but `read`.

Legend: E routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from abyssal.config.parallel import ParallelConfig
from abyssal.model import RouterStatistics, Transformer
from abyssal.parallel.apply import begin_micro_batch, begin_step, end_step
from abyssal.ranks.ranks import ALONE, Ranks
from abyssal.train.balancing import add_loads
from abyssal.train.objective import Losses, MicroBatch, Objective


class StepTotals(NamedTuple):
    """What a step's micro-batches came to, over all ranks, on the host."""

    losses: dict[str, float]  # summed over tokens, by the objective's names
    balance_loss: float  # mean over MoE layers and sequences, 1 at perfect balance
    loads: dict[int, Tensor]  # layer -> [E] tokens sent to each expert
    gradient_norm: float


@dataclass
class StepSums:
    """What the micro-batches of a step report, on the device."""

    losses: dict[str, Tensor] = field(default_factory=dict)  # [] each
    loads: dict[int, Tensor] = field(default_factory=dict)  # layer -> [E]
    balance: list[Tensor] = field(default_factory=list)  # [] each, one a layer and micro-batch

    def add(self, losses: Losses, statistics: RouterStatistics | None) -> None:
        """Take in one micro-batch."""
        for name, value in losses.sums.items():
            self.losses[name] = self.losses[name] + value if name in self.losses else value
        if statistics is not None:
            add_loads(self.loads, statistics.expert_load)
            self.balance += statistics.balance_loss.values()

    def read(self, gradient_norm: Tensor, ranks: Ranks = ALONE) -> StepTotals:
        """Sum over the ranks, whose shares are alike, and read everything at once: a step's one wait for the device.

        Counts of tokens are exact in the float64 that all is read in.
        """
        names, layers = list(self.losses), sorted(self.loads)
        device = gradient_norm.device
        balance = torch.stack(self.balance).mean() if self.balance else torch.zeros(())
        mean = balance.to(torch.float64) / ranks.world_size
        parts = [*(self.losses[name][None] for name in names), mean[None], *(self.loads[layer] for layer in layers)]
        sums = ranks.sum(torch.cat([part.to(device, torch.float64) for part in parts]))
        values = torch.cat([sums, gradient_norm.to(torch.float64)[None]]).cpu()
        *losses, balance, loads, norm = values.split([*[1] * len(names), 1, values.numel() - len(names) - 2, 1])
        by_layer = loads.to(torch.int64).split([len(self.loads[layer]) for layer in layers]) if layers else ()
        return StepTotals(
            losses={name: value.item() for name, value in zip(names, losses, strict=True)},
            balance_loss=balance.item(),
            loads=dict(zip(layers, by_layer, strict=True)),
            gradient_norm=norm.item(),
        )


class Executor(Protocol):
    """Runs all micro-batches of a step, forward and backward: gradients are whole, and added up, when it returns."""

    def __call__(
        self,
        model: Transformer,
        objective: Objective,
        micro_batches: Sequence[MicroBatch],
        config: ParallelConfig,
        ranks: Ranks,
    ) -> StepSums:
        """Return the sums over the micro-batches of this rank."""
        ...


def run_in_turn(
    model: Transformer,
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    config: ParallelConfig,
    ranks: Ranks = ALONE,
) -> StepSums:
    """The plain executor: each micro-batch forward and backward, one after the other, through a whole model."""
    sums = StepSums()
    begin_step(model, config)
    for number, micro_batch in enumerate(micro_batches, start=1):
        begin_micro_batch(model, config, last=number == len(micro_batches))
        ranks.mark(f"forward pass of micro-batch {number}")
        losses, statistics = forward(model, objective, micro_batch)
        ranks.mark(f"backward pass of micro-batch {number}")
        losses.total.backward()
        sums.add(losses, statistics)
    ranks.mark("reduction of gradients")
    end_step(model)
    return sums


def forward(
    model: Transformer, objective: Objective, micro_batch: MicroBatch
) -> tuple[Losses, RouterStatistics | None]:
    """Run one micro-batch through a whole model; return its losses and what its routers report."""
    tokens, ctx = objective.inputs(micro_batch)
    return objective.losses(model, model(tokens, ctx), micro_batch, ctx), ctx.statistics
