"""A built model spread over ranks: experts first, then everything sharded. Paper: §3.2.2, §3.2.3."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from abyssal.config.parallel import ParallelConfig
from abyssal.model import Transformer, drop_prepared_weights, prepare_weights
from abyssal.model.feed_forward import MixtureOfExperts, Router, StackedExperts
from abyssal.model.mtp import MTPBlock
from abyssal.ops.experts import Experts
from abyssal.ops.linear import WeightGradients
from abyssal.parallel.dispatch import expert_parallel_dispatcher
from abyssal.parallel.mesh import Mesh


def parallelise(model: Transformer, config: ParallelConfig, mesh: Mesh) -> None:
    """Spread a model on the meta device, or one that is equal on all ranks, over the ranks of `mesh`, in place.

    Stacked experts become DTensors split over ep by their first dim and sharded over edp by their second; all other
    parameters are sharded by their first dim over the ranks of the stage. Balancing biases stay whole on every rank.
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
    pass, since the MTP modules use them too. Weights are gathered in the compute dtype, in which they are used; only a
    router computes in at least fp32, so its weight is a unit of its own. Gradients are summed in fp32, the objective
    being divided by the tokens of the whole batch already.
    """
    narrow, wide = policies(model.compute_dtype)
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
            elif isinstance(module, Router):
                fully_shard(module, mesh=mesh.dense, mp_policy=wide, reshard_after_forward=again)
        fully_shard(block, mesh=mesh.dense, mp_policy=narrow, reshard_after_forward=again)
        if isinstance(block, MTPBlock):
            register_fsdp_forward_method(block, "predict")
    fully_shard(model, mesh=mesh.dense, mp_policy=narrow, reshard_after_forward=False)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_unshard_in_backward(again)  # else FSDP, looking ahead, would gather once more what was just let go


def policies(compute_dtype: torch.dtype) -> tuple[MixedPrecisionPolicy, MixedPrecisionPolicy]:
    """Return what weights are gathered and gradients summed in: of all units but the routers', and of the routers'."""
    wide = torch.promote_types(compute_dtype, torch.float32)
    narrow = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=wide, cast_forward_inputs=False)
    return narrow, MixedPrecisionPolicy(reduce_dtype=wide, cast_forward_inputs=False)


def units(model: nn.Module) -> list[FSDPModule]:
    """Return what is gathered and reduced at a time; none in one process."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def begin_step(model: Transformer, config: ParallelConfig, deferred: WeightGradients | None = None) -> None:
    """Make the weights ready for the micro-batches of a step, in place; they must not change before `end_step`.

    In one process every weight is cast to the compute dtype. On many ranks the gathering casts: below ZeRO-3
    everything is gathered here, so that whoever calls a block's steps apart, where FSDP's hooks do not fire, finds
    whole weights; under ZeRO-3, which is for whole forward passes only, the root's unit alone.

    Args:
        model: spread over ranks or not.
        config: of the run.
        deferred: takes the weights' gradients, where backward passes are to leave them for later.
    """
    if isinstance(model, FSDPModule):
        state: Any = fully_shard.state(model)  # type: ignore[attr-defined]
        state._lazy_init()  # as the root: the first unit that is gathered would take itself for it
        for unit in units(model):
            if config.zero_stage < 3 or unit is model:
                unit.unshard()
            _sum_gradients_widely(unit)
        begin_micro_batch(model, config, last=False)
    if not isinstance(model, FSDPModule) or deferred is not None:
        prepare_weights(model, deferred)


def _sum_gradients_widely(unit: FSDPModule) -> None:
    """Let a unit's whole weights have gradients in the dtype in which they are summed over the ranks.

    A weight that several products use in one backward pass, or in passes whose gradients are reduced together, has
    them added up in that. The whole weights come into being when they are first gathered.
    """
    for group in _groups(unit):
        gathered = group.is_unsharded
        if not all(hasattr(parameter, "_unsharded_param") for parameter in group.fsdp_params):
            unit.unshard()
        for parameter in group.fsdp_params:
            parameter._unsharded_param.grad_dtype = parameter.reduce_dtype or parameter.orig_dtype
        if not gathered and group.is_unsharded:
            unit.reshard()


def begin_micro_batch(model: nn.Module, config: ParallelConfig, *, last: bool) -> None:
    """Say, before a forward pass, whether its backward pass is the step's last, and to reduce gradients while it runs.

    ZeRO-1 keeps gradients and weights whole until then, ZeRO-2 only the weights. Where steps are called apart or
    gradients deferred no pass is known as the last, and `end_step` does it.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or config.zero_stage > 1)
        if config.zero_stage < 3:
            model.set_reshard_after_backward(last)
        model.set_is_last_backward(last)


def end_step(model: Transformer) -> None:
    """Reduce the gradients that backward passes left whole, and drop what `begin_step` has made, in place.

    Left are those of steps that were called apart, and those of weights that were deferred and have been run.
    """
    drop_prepared_weights(model)
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(True)
        model.set_reshard_after_backward(True)
        model.set_is_last_backward(True)
        for unit in reversed(units(model)):
            for group in _groups(unit):
                group.post_backward()
        state: Any = fully_shard.state(model)  # type: ignore[attr-defined]
        state._root_post_backward_final_callback()


def _groups(unit: FSDPModule) -> list[Any]:
    """Return FSDP's own record of a unit's weights, as torch's pipelines use it: it has no public one."""
    return fully_shard.state(unit)._fsdp_param_groups  # type: ignore[attr-defined, no-any-return]


def reshard(model: nn.Module) -> None:
    """Drop the gathered weights, as after passes without a backward pass, so that the shards are the weights again."""
    for unit in units(model):
        unit.reshard()
