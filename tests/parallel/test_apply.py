"""Weights made ready for a step, and gradients reduced at its end, in one process and on four ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from abyssal.config import ModelConfig
from abyssal.config.parallel import ParallelConfig
from abyssal.model import Context, Transformer, initialise, next_tokens
from abyssal.model.prepared import weighted_modules
from abyssal.ops.kernels import Kernels
from abyssal.ops.linear import WeightGradients
from abyssal.parallel.apply import begin_micro_batch, begin_step, end_step, parallelise
from abyssal.parallel.layout import lay_out
from abyssal.parallel.mesh import Mesh
from abyssal.ranks.placements import local, local_shard
from ranks import run_ranks
from ranks.spread import SHAPE

pytestmark = pytest.mark.slow

LENGTHS = (7, 8)
TOKENS = sum(LENGTHS)
MICRO_BATCHES = 3
RANKS = 4
BF16 = torch.bfloat16
Gradients = dict[str, Tensor]
Forward = Callable[[Transformer, Tensor, Context], Tensor]


def build(dtype: torch.dtype, config: ParallelConfig | None = None) -> Transformer:
    """The same weights in every layout, masters in at least fp32."""
    model_config = ModelConfig.parse({**SHAPE, "moe_intermediate_size": 16}, source="test")
    model = Transformer(model_config, Kernels(), dtype).to(torch.promote_types(dtype, torch.float32))
    initialise(model, 5)
    if config is not None:
        parallelise(model, config, Mesh.over(lay_out(config, model_config, RANKS, RANKS), torch.device("cpu")))
    return model


def by_calls(model: Transformer, tokens: Tensor, ctx: Context) -> Tensor:
    return model(tokens, ctx)  # type: ignore[no-any-return]


def by_steps(model: Transformer, tokens: Tensor, ctx: Context) -> Tensor:
    """The main model as a pipeline runs it: the steps of each block apart, so that no block is called."""
    ctx = model.with_rotary(ctx)
    h = model.embed(tokens)
    for number in model.stage.layers:
        block = model.model.layers[number]
        h = block.finish(block.combine(block.compute(block.dispatch(block.attend(h, ctx)))))
    return model.model.norm(h)  # type: ignore[no-any-return]


def run_step(
    model: Transformer,
    config: ParallelConfig,
    forward: Forward = by_calls,
    deferred: WeightGradients | None = None,
) -> None:
    """Leave the gradients of a step over several micro-batches, other ones on every rank, in the parameters."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    apart = forward is by_steps or deferred is not None
    waiting = []
    begin_step(model, config, deferred)
    for number in range(MICRO_BATCHES):
        begin_micro_batch(model, config, last=not apart and number == MICRO_BATCHES - 1)
        generator = torch.Generator().manual_seed(10 * rank + number)
        tokens = torch.randint(model.config.vocab_size, (TOKENS,), generator=generator)
        ctx = replace(Context.packed(LENGTHS), balance_weight=0.3)
        h = forward(model, tokens, ctx)
        loss = model.kernels.cross_entropy(h, model.head_weight, tokens.roll(-1))
        for further, kept in model.predict_further(h, next_tokens(tokens, 1), ctx):
            loss = loss + model.kernels.cross_entropy(further, model.head_weight, tokens.roll(-2)[kept])
        loss.backward()
        if deferred is not None:
            assert len(deferred) > 0
            waiting.append(deferred.take())
    for one in waiting:
        one.run()
    end_step(model)


def gradients(model: Transformer) -> Gradients:
    """This rank's part of every gradient, which goes with its parameter."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype, name
        assert isinstance(parameter.grad, DTensor) == isinstance(parameter, DTensor)
        found[name] = local_shard(parameter.grad)[0].clone()
        parameter.grad = None
    return found


def assert_equal(found: Gradients, expected: Gradients, where: object) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), (where, name)


class Casts(TorchDispatchMode):
    """Counts how often memory of a parameter, whole or a part of it, is cast to bf16.

    `others` are casts of something else that has the shape of a whole weight, as a gathered one would.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.owners = {local(p).untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
        self.shapes = {p.shape for module in weighted_modules(model) for p in module.parameters()}
        self.counts: Counter[str] = Counter()
        self.others: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.note(args[0], result)
        elif func is torch.ops.aten._foreach_copy_.default:  # FSDP casts so, into what it sends
            for target, source in zip(*args[:2], strict=True):
                self.note(source, target)
        return result

    def note(self, source: Tensor, result: Tensor) -> None:
        if source.dtype == result.dtype or result.dtype != BF16:
            return
        owner = self.owners.get(source.untyped_storage().data_ptr())
        if owner is not None:
            self.counts[owner] += 1
        elif result.shape in self.shapes:
            self.others.append(result.shape)


def count_casts(config: ParallelConfig, model: Transformer) -> tuple[Counter[str], list[torch.Size]]:
    with Casts(model) as casts:
        run_step(model, config)
    return casts.counts, casts.others


def prepared_names(model: Transformer) -> set[str]:
    """The weights of projections and experts; the head is one, the router computes in fp32."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for module in weighted_modules(model) for p in module.parameters()}


def test_one_process_casts_each_weight_once_a_step() -> None:
    model = build(BF16)
    names = prepared_names(model)
    assert {"model.layers.0.mlp.down_proj.weight", "model.layers.2.mlp.experts.down_proj"} <= names
    counts, others = count_casts(ParallelConfig(), model)
    assert {name: counts[name] for name in names} == dict.fromkeys(names, 1)
    assert others == []


@pytest.mark.parametrize("dtype", [torch.float64, BF16], ids=str)
def test_outside_a_step_a_weight_is_cast_on_use_and_follows_every_change(dtype: torch.dtype) -> None:
    model = build(dtype)
    tokens, ctx = torch.arange(TOKENS), Context.packed(LENGTHS)
    with torch.no_grad():
        before = model(tokens, ctx)
        begin_step(model, ParallelConfig())
        assert torch.equal(model(tokens, ctx), before)
        end_step(model)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert not torch.equal(model(tokens, ctx), before)


#: Forward passes and where gradients are left.
APART: tuple[tuple[Forward, WeightGradients | None], ...] = (
    (by_calls, WeightGradients()),
    (by_steps, None),
    (by_steps, WeightGradients()),
)


@pytest.mark.parametrize("dtype", [torch.float64, BF16], ids=str)
def test_one_process_gives_the_same_gradients_by_steps_and_deferred(dtype: torch.dtype) -> None:
    model, config = build(dtype), ParallelConfig()
    run_step(model, config)
    expected = gradients(model)
    for forward in (by_calls, by_steps):
        for deferred in (None, WeightGradients()):
            run_step(model, config, forward, deferred)
            assert_equal(gradients(model), expected, (forward, deferred))


def on_ranks() -> dict[int, Any]:
    """Every ZeRO stage on one group of ranks, which takes longer to start than they to run."""
    dist.init_process_group("gloo")
    found: dict[int, Any] = {}
    for zero_stage in (1, 2, 3):
        config = ParallelConfig(ep_size=2, zero_stage=zero_stage)
        model = build(BF16, config)
        names = prepared_names(model)
        run_step(model, config)  # after which FSDP no longer moves its shards
        expected = gradients(model)
        found[zero_stage] = names, *count_casts(config, model)
        assert_equal(gradients(model), expected, zero_stage)  # from shards again, as at the first step
        for forward, deferred in APART if zero_stage < 3 else ():
            run_step(model, config, forward, deferred)
            # ZeRO-2 reduces at other times, so sums are rounded otherwise
            close = {"rtol": 0.0, "atol": 0.0} if zero_stage == 1 else {"rtol": 1e-4, "atol": 1e-5}
            for name, gradient in gradients(model).items():
                torch.testing.assert_close(
                    gradient, expected[name], **close, msg=lambda t, w=(zero_stage, forward, name): f"{w}: {t}"
                )
    return found


def test_ranks_cast_once_a_step_and_reduce_what_is_left_at_its_end() -> None:
    """Below ZeRO-3 a shard is cast where it is gathered, once; under it once for each gathering."""
    for rank in run_ranks(RANKS, on_ranks):
        for zero_stage, (names, counts, others) in rank.items():
            assert {"lm_head.weight", "model.layers.2.mlp.experts.down_proj"} <= names
            assert not any(".mlp.gate." in name for name in counts), "the router computes in fp32"
            assert others == [], zero_stage
            least = most = 1
            if zero_stage == 3:  # once in each pass; blocks in each backward pass too, and at times to look ahead
                least, most = MICRO_BATCHES, 3 * MICRO_BATCHES
            assert {name: counts[name] for name in names if not least <= counts[name] <= most} == {}, zero_stage
