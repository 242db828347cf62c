"""The router: affinities, group-limited choice of experts, and their weights.

Legend: T packed tokens, D hidden, E routed experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def affinities(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return sigmoid(hidden @ weight.T).

    Args:
        hidden: [T, D].
        weight: [E, D], one centroid an expert.

    Returns:
        [T, E] in at least fp32: near ties, lower precision picks other experts.

    Paper: §2.1.2 eq. 15.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.linear(hidden.to(wide), weight.to(wide)).sigmoid()  # eq. 15


def choose_experts(scores: Tensor, bias: Tensor, *, n_group: int, topk_group: int, top_k: int) -> Tensor:
    """Choose the `top_k` experts of each token among its `topk_group` best groups.

    The bias takes part in this choice only, never in an expert's weight. A group is scored by the sum of its best two
    biased affinities; the groups not chosen are masked with -inf, since biased affinities may be negative.

    Args:
        scores: [T, E] affinities.
        bias: [E], the load-balancing bias.

    Returns:
        [T, K] expert indices, in no particular order. Not differentiable.

    Paper: §2.1.2 eq. 16; the limit to groups is its node-limited routing.
    """
    biased = scores.detach() + bias  # [T, E]
    if n_group > 1:
        grouped = biased.unflatten(-1, (n_group, -1))  # [T, groups, E/groups]
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices  # [T, topk_group]
        dropped = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=scores.device).scatter(-1, best, False)
        biased = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(-2)  # [T, E]
    return biased.topk(top_k, dim=-1, sorted=False).indices  # eq. 14, 16


def routing_weights(scores: Tensor, experts: Tensor, *, normalise: bool, scale: float) -> Tensor:
    """Return the weights of the chosen experts: their unbiased affinities, divided by their sum, times `scale`.

    Args:
        scores: [T, E].
        experts: [T, K] indices.

    Returns:
        [T, K] in scores' dtype.

    Paper: §2.1.2 eq. 13.
    """
    chosen = scores.gather(-1, experts)  # eq. 14
    if normalise:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)  # eq. 13
    return chosen * scale
