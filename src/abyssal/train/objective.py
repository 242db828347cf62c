"""What is learnt: from a micro-batch and what the network makes of it to the loss that is differentiated.

Legend: B sequences, S positions each, T = B * S packed tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from abyssal.model import Context, RouterStatistics, Transformer, next_tokens


@dataclass(frozen=True)
class MicroBatch:
    """The windows of one forward and backward pass.

    `lengths` are, of each window, the inputs of one document after another: none then sees another document, each is a
    sequence of its own to the balance loss, and the MTP modules end with it. Without, a window is one.
    """

    windows: Tensor  # [B, S + 1] token ids
    lengths: Sequence[Sequence[int]] = ()
    token_weights: Tensor | None = None  # [B, S] what each target's loss counts: a mask, an advantage; none: 1 each


class Losses(NamedTuple):
    """What one micro-batch comes to."""

    total: Tensor  # [], its share of the batch's objective, to be differentiated
    sums: dict[str, Tensor]  # [] each, in nats, summed over tokens, without their weight in the objective


class Objective(Protocol):
    """A function of a micro-batch and a stage's output; executors know nothing else of what is learnt."""

    def inputs(self, micro_batch: MicroBatch) -> tuple[Tensor, Context]:
        """Return the ids [T] that enter the network, and their context."""
        ...

    def losses(self, model: Transformer, hidden: Tensor, micro_batch: MicroBatch, ctx: Context) -> Losses:
        """Return the losses of hidden states [T, D] that left the stage with the head."""
        ...


@dataclass(frozen=True)
class NextTokenObjective:
    """Next-token prediction with multi-token prediction, and the balance loss beside them.

    total = (L_main + lambda / D * sum_k L_k) / tokens; the balance loss enters by itself at the affinities. L_k at
    depth k has the targets from the (2 + k)-th token on, and is divided by all T as in the report. `tokens` and
    `sequences` are those of the whole batch, so that micro-batches simply add up; a sequence is what attention stays
    inside of, a window or a document.

    Paper: §2.2 eq. 24, 25; §2.1.2 eq. 17.
    """

    tokens: int
    sequences: int
    mtp: float  # lambda
    balance: float  # alpha

    def inputs(self, micro_batch: MicroBatch) -> tuple[Tensor, Context]:
        """See `Objective`: all tokens of a window but the last."""
        count, length = micro_batch.windows.shape[0], micro_batch.windows.shape[1] - 1
        lengths = [n for row in micro_batch.lengths for n in row] or [length] * count
        packed = Context.packed(lengths, micro_batch.windows.device)
        ctx = Context(
            lengths=packed.lengths,
            positions=packed.positions,
            statistics=RouterStatistics(),
            balance_weight=self.balance / self.sequences,
        )
        return micro_batch.windows[:, :-1].flatten(), ctx

    def losses(self, model: Transformer, hidden: Tensor, micro_batch: MicroBatch, ctx: Context) -> Losses:
        """See `Objective`: `main`, and `mtp_1`, `mtp_2`, ... of each depth."""
        tokens, targets = micro_batch.windows[:, :-1].flatten(), micro_batch.windows[:, 1:].flatten()  # [T] each
        counts = None if micro_batch.token_weights is None else micro_batch.token_weights.flatten()  # [T]
        cross_entropy, head = model.kernels.cross_entropy, model.head_weight  # whole while the model is in use
        main = cross_entropy(hidden, head, targets, counts)
        mtp = []
        further = next_tokens(tokens, len(model.mtp_modules))
        for k, (h_k, kept) in enumerate(model.predict_further(hidden, further, ctx), start=1):
            places = kept + k  # of the targets
            mtp.append(cross_entropy(h_k, head, targets[places], None if counts is None else counts[places]))  # eq. 24
        total = main
        if mtp:
            total = total + self.mtp / len(mtp) * torch.stack(mtp).sum()  # eq. 25
        named = {"main": main, **{f"mtp_{k}": loss for k, loss in enumerate(mtp, start=1)}}
        return Losses(total / self.tokens, {name: loss.detach() for name, loss in named.items()})
