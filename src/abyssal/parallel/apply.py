"""A built model spread over ranks: experts first, then everything sharded. Paper: §3.2.2, §3.2.3."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from abyssal.config.parallel import ParallelConfig
from abyssal.model import Transformer
from abyssal.model.feed_forward import MixtureOfExperts, StackedExperts
from abyssal.model.mtp import MTPBlock
from abyssal.ops.experts import Experts
from abyssal.parallel.dispatch import expert_parallel_dispatcher
from abyssal.parallel.mesh import Mesh


def parallelise(model: Transformer, config: ParallelConfig, mesh: Mesh) -> None:
    """Spread a model on the meta device, or one that is equal on all ranks, over the ranks of `mesh`, in place.

    Stacked experts become DTensors split over ep by their first dim and sharded over edp by their second; all other
    parameters are sharded by their first dim over the ranks of the stage. Gate biases stay whole on every rank.
    """
    spread_experts(model, config, mesh)
    shard(model, config, mesh)


def moe_layers(model: nn.Module) -> list[MixtureOfExperts]:
    """Return every mixture of experts of a model, MTP modules included."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def spread_experts(model: nn.Module, config: ParallelConfig, mesh: Mesh) -> None:
    """Leave each rank its slice of the experts of every layer, and put the all-to-all at the dispatcher seam."""
    if not (layers := moe_layers(model)):
        return
    layout, num_experts = mesh.layout, layers[0].config.n_routed_experts
    dispatcher = expert_parallel_dispatcher(config, layout, mesh.expert.get_group(), num_experts)
    for moe in layers:
        experts = moe.experts
        for name in ("gate_up_proj", "down_proj"):
            whole: nn.Parameter = getattr(experts, name)
            own = whole.detach().chunk(layout.ep_size)[mesh.expert.get_local_rank()]
            setattr(experts, name, nn.Parameter(DTensor.from_local(own, mesh.expert, [Shard(0)], run_check=False)))
        experts.kernel = of_local_weights(experts.kernel)
        if layout.ep_size > 1:
            moe.dispatcher = dispatcher


def of_local_weights(kernel: Experts) -> Experts:
    """Return `kernel` for stacks that are DTensors, of which it takes this rank's experts."""

    def local(rows: Tensor, weights: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, *rest: Any) -> Tensor:
        return kernel(rows, weights, counts, cast(DTensor, gate_up).to_local(), cast(DTensor, down).to_local(), *rest)

    local.__name__ = f"local {getattr(kernel, '__name__', kernel)}"
    return local


def shard(model: Transformer, config: ParallelConfig, mesh: Mesh) -> None:
    """Shard every block's weights, and the experts' apart from the rest, over the ranks with equal ones.

    Embedding, final norm and head are the root's own unit, unsharded from a forward pass to the end of its backward
    pass, since the MTP modules use them too. Experts are gathered in the compute dtype, in which alone they are used;
    gradients are summed in fp32, the objective being divided by the tokens of the whole batch already.
    """
    whole, narrow = policies(model.compute_dtype)
    again = config.zero_stage == 3  # gathered again for the backward pass
    for block in model.model.layers:
        for module in block.modules():
            if isinstance(module, StackedExperts):
                fully_shard(
                    module,
                    mesh=mesh.expert_data,
                    mp_policy=narrow,
                    reshard_after_forward=again,
                    shard_placement_fn=lambda _: Shard(1),
                )
        fully_shard(block, mesh=mesh.dense, mp_policy=whole, reshard_after_forward=again)
        if isinstance(block, MTPBlock):
            register_fsdp_forward_method(block, "predict")
    fully_shard(model, mesh=mesh.dense, mp_policy=whole, reshard_after_forward=False)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def policies(compute_dtype: torch.dtype) -> tuple[MixedPrecisionPolicy, MixedPrecisionPolicy]:
    """Return what weights are gathered and gradients summed in: of all units but the experts', and of the experts'."""
    wide = torch.promote_types(compute_dtype, torch.float32)
    whole = MixedPrecisionPolicy(reduce_dtype=wide, cast_forward_inputs=False)
    return whole, MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=wide, cast_forward_inputs=False)


def units(model: nn.Module) -> list[FSDPModule]:
    """Return what is gathered and reduced at a time; none in one process."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def begin_micro_batch(model: nn.Module, config: ParallelConfig, *, last: bool) -> None:
    """Say, before a forward pass, whether its backward pass is the step's last.

    ZeRO-1 keeps gradients and weights whole until then, ZeRO-2 only the weights.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or config.zero_stage > 1)
        if config.zero_stage < 3:
            model.set_reshard_after_backward(last)
        model.set_is_last_backward(last)


def reshard(model: nn.Module) -> None:
    """Drop the gathered weights, as after passes without a backward pass, so that the shards are the weights again."""
    for unit in units(model):
        unit.reshard()
