"""AdamW as published, and the gradient norm. Paper: §4.2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.config.run import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return fused AdamW over the (fp32) master weights; the learning rate is set before each step.

    Weight decay applies to matrices. Differs: the report does not say whether norm scales decay; here they do not.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    scales = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use `learning_rate` for every group from now on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients in place so that their joint norm is at most `max_norm`.

    Returns:
        The norm before clipping, [], fp32; not finite if any gradient is not.
    """
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm, foreach=True)
