"""The optimizers of a run, stepped as one, and the gradient norm. Paper: §4.2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.config.run import OptimizerConfig
from abyssal.model import Transformer
from abyssal.parallel.matrix_exchange import MatrixExchange
from abyssal.parallel.mesh import Mesh
from abyssal.ranks.placements import copies, local
from abyssal.ranks.ranks import ALONE, Ranks
from abyssal.train.muon import Muon, cost, muon_tensors

#: Matrices that Muon leaves to AdamW: rows of tables, and the gate, whose rows are centroids.
TABLES = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")


class Optimizers:
    """One or two optimizers over the (fp32) master weights, each over parameters of its own.

    A group's `lr_scale` multiplies the schedule's learning rate; 1 if not given.
    """

    def __init__(self, adamw: torch.optim.AdamW, muon: Muon | None = None) -> None:
        """Step `adamw`, and `muon` if there is one."""
        self.adamw, self.muon = adamw, muon

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both, as torch keeps them."""
        return self.adamw.param_groups + (self.muon.param_groups if self.muon else [])

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def step(self, learning_rate: float) -> None:
        """Update all parameters in place."""
        for group in self.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        self.adamw.step()
        if self.muon is not None:
            self.muon.step()

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the live state by parameter name, made as zeros where no step was taken yet."""
        taken = {id(p) for group in self.muon.param_groups for p in group["params"]} if self.muon else set()
        by_adamw = {name: p for name, p in parameters.items() if id(p) not in taken}
        by_muon = {name: p for name, p in parameters.items() if id(p) in taken}
        found = adamw_tensors(self.adamw, by_adamw)
        return found | muon_tensors(self.muon, by_muon) if self.muon else found


def adamw_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return an AdamW's state as {parameter name: {"step", "exp_avg", "exp_avg_sq"}}, the live tensors themselves.

    What a fresh optimizer creates at its first step is created here, as zeros, so that a state can be loaded into it.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    wide = torch.get_default_dtype() == torch.float64
    for parameter in parameters.values():
        state, group = optimizer.state[parameter], groups[id(parameter)]
        if not state:  # as torch's own AdamW does: the fused kernel wants an fp32 count beside the parameter
            fused = bool(group["fused"])
            device = parameter.device if fused or group["capturable"] else None
            state["step"] = torch.zeros((), dtype=torch.float64 if wide and not fused else torch.float32, device=device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return {name: dict(optimizer.state[parameter]) for name, parameter in parameters.items()}


def build_optimizer(model: Transformer, config: OptimizerConfig, mesh: Mesh | None = None) -> Optimizers:
    """Return fused AdamW over everything, or, if the recipe says so, Muon over the hidden matrices and AdamW beside it.

    With a mesh, over which the model is spread, all its ranks call this, and step together. Weight decay applies to
    matrices. Differs: the report does not say whether norm scales decay; here they do not.
    """
    named = dict(model.named_parameters())
    hidden = {n: p for n, p in named.items() if config.name == "muon" and p.dim() >= 2 and not n.endswith(TABLES)}
    rest = [p for n, p in named.items() if n not in hidden]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    if not hidden:
        return Optimizers(adamw)
    for group in adamw.param_groups:
        group["lr_scale"] = config.beside_muon_lr_scale
    stacked = [p for n, p in hidden.items() if n.endswith("gate_up_proj")]
    single = [p for n, p in hidden.items() if not n.endswith("gate_up_proj")]
    groups = [(matrices, parts) for matrices, parts in ((single, 1), (stacked, 2)) if matrices]
    matrix_exchange = None
    if mesh is not None:
        matrix_exchange = MatrixExchange(
            [(p, parts) for matrices, parts in groups for p in matrices], mesh.stage.get_group(), cost
        )
    muon = Muon(
        [{"params": matrices, "parts": parts, "lr_scale": config.muon_lr_scale} for matrices, parts in groups],
        momentum=config.muon_momentum,
        weight_decay=config.weight_decay,
        products=model.compute_dtype,  # the one that this machine is fast in, where the recipe leaves that to it
        matrix_exchange=matrix_exchange,
    )
    return Optimizers(adamw, muon)


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float, ranks: Ranks = ALONE) -> Tensor:
    """Scale all gradients in place so that their joint norm, over the shards of all ranks, is at most `max_norm`.

    Returns:
        The norm before clipping, []; not finite if any gradient is not.
    """
    if ranks.world_size == 1:
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm, foreach=True)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    parts = [local(gradient) for gradient in gradients]
    norms = torch._foreach_norm(parts, dtype=torch.float64)
    squares = [norm.square() / copies(gradient) for norm, gradient in zip(norms, gradients, strict=True)]
    norm = ranks.sum(torch.stack(squares).sum()).sqrt()
    torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
