"""The training objective of one micro-batch.

Legend: B sequences, S positions each, T = B * S packed tokens, D hidden, E routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.model import Context, RouterStatistics, Transformer, next_tokens


@dataclass(frozen=True)
class ObjectiveWeights:
    """What scales the parts of the objective in one step.

    `tokens` and `sequences` are those of the whole batch, so that micro-batches simply add up; a sequence is what
    attention stays inside of, a window or a document.
    """

    tokens: int
    sequences: int
    mtp: float  # lambda
    balance: float  # alpha


@dataclass(frozen=True)
class MicroBatchLoss:
    """Loss sums of one micro-batch in nats; `total` is the share of the batch's objective, to be differentiated."""

    total: Tensor  # []
    main: Tensor  # [], summed over tokens
    mtp: tuple[Tensor, ...]  # [] each, summed over tokens, one a depth
    statistics: RouterStatistics


def micro_batch_loss(
    model: Transformer, windows: Tensor, weights: ObjectiveWeights, lengths: Sequence[Sequence[int]] = ()
) -> MicroBatchLoss:
    """Return the objective of windows of S + 1 tokens, of which each but the last predicts its successor.

    total = (L_main + lambda / D * sum_k L_k) / tokens, and the balance loss enters by itself at the affinities.
    L_k at depth k has the targets from the (2 + k)-th token on, and is divided by all T as in the report.

    Args:
        windows: [B, S + 1] token ids.
        weights: of the parts.
        lengths: of each window, the inputs of one document after another: none then sees another document, each is a
            sequence of its own to the balance loss, and the MTP modules end with it. Without, a window is one.

    Paper: §2.2 eq. 24, 25; §2.1.2 eq. 17.
    """
    count, length = windows.shape[0], windows.shape[1] - 1
    tokens, targets = windows[:, :-1].flatten(), windows[:, 1:].flatten()  # [T] each
    whole = Context.packed([n for row in lengths for n in row] or [length] * count, windows.device)
    ctx = Context(
        lengths=whole.lengths,
        positions=whole.positions,
        statistics=RouterStatistics(),
        balance_weight=weights.balance / weights.sequences,
    )
    assert ctx.statistics is not None
    h = model(tokens, ctx)
    cross_entropy, head = model.kernels.cross_entropy, model.head_weight  # whole while the model is in use
    main = cross_entropy(h, head, targets)
    mtp = []
    further = next_tokens(tokens, len(model.mtp_modules))
    for k, (h_k, kept) in enumerate(model.predict_further(h, further, ctx), start=1):
        mtp.append(cross_entropy(h_k, head, targets[kept + k]))  # eq. 24
    total = main
    if mtp:
        total = total + weights.mtp / len(mtp) * torch.stack(mtp).sum()  # eq. 25
    return MicroBatchLoss(total / weights.tokens, main.detach(), tuple(m.detach() for m in mtp), ctx.statistics)
