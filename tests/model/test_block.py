"""The steps of a block, run apart with autograd cut between them, equal the block; every expert lives here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from abyssal.model import Block, Context, RouterStatistics, Transformer, prepare_weights
from abyssal.model.block import map_tensors, tensors
from abyssal.ops.linear import WeightGradients
from ranks.cut import CUTS, cut_block, interleave

LENGTHS = ((5, 3), (2, 4, 3))


def draw(kind: str, seed: int, draw_config: Any, build: Any) -> tuple[Transformer, Block]:
    """A float64 block of the kind: dense, mixture or mtp."""
    config = draw_config(seed, first_k_dense_replace=1, num_nextn_predict_layers=1)
    model = build(config, seed)
    return model, model.model.layers[{"dense": 0, "mixture": 1, "mtp": 3}[kind]]


def draw_input(model: Transformer, seed: int, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Context]:
    generator = torch.Generator().manual_seed(seed)
    x, outward = (
        torch.randn(sum(lengths), model.config.hidden_size, dtype=torch.float64, generator=generator) for _ in "xy"
    )
    ctx = replace(Context.packed(lengths), statistics=RouterStatistics(), balance_weight=0.4)
    return x, outward, model.with_rotary(ctx)


def uncut(block: Block, x: Tensor, outward: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    """Output and input gradient of the block as it is; the other gradients stay in the parameters."""
    x = x.clone().requires_grad_()
    y = block(x, ctx)
    y.backward(outward)
    assert x.grad is not None
    return y.detach(), x.grad


def gradients(block: Block) -> dict[str, Tensor]:
    taken = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
    block.zero_grad()
    return taken


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(cut) or "uncut")
@pytest.mark.parametrize("kind", ["dense", "mixture", "mtp"])
@pytest.mark.parametrize("prepared", [False, True], ids=["cast on use", "prepared, dW deferred"])
@pytest.mark.parametrize("seed", range(2), ids="seed{}".format)
def test_two_micro_batches_interleaved_piece_by_piece_equal_the_block(
    seed: int, prepared: bool, kind: str, cut: tuple[str, ...], draw_config: Any, build: Any
) -> None:
    """Forward of one beside backward of the other, as a pipeline overlaps them, weight gradients last."""
    model, block = draw(kind, seed, draw_config, build)
    drawn = [draw_input(model, seed + number, lengths) for number, lengths in enumerate(LENGTHS)]
    expected = [uncut(block, *one) for one in drawn]
    oracle = gradients(block)

    deferred = WeightGradients()
    if prepared:
        prepare_weights(model, deferred)
    chains = [cut_block(block, cut, x, ctx) for x, _, ctx in drawn]
    d_inputs = interleave(*chains, *(outward for _, outward, _ in drawn), deferred)
    for chain, d_input, (y, d_x) in zip(chains, d_inputs, expected, strict=True):
        assert torch.equal(chain.state, y)
        torch.testing.assert_close(d_input, d_x, rtol=1e-12, atol=1e-12)
    actual = gradients(block)
    assert actual.keys() == oracle.keys()
    for name, gradient in oracle.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-12, atol=1e-12, msg=lambda t, n=name: f"{n}: {t}")
    for (_, _, ctx), lengths in zip(drawn, LENGTHS, strict=True):
        loads = ctx.statistics.expert_load.values()
        assert [int(load.sum()) for load in loads] == [sum(lengths) * model.config.num_experts_per_tok] * len(loads)


def test_the_cut_carries_the_injected_balance_loss(draw_config: Any, build: Any) -> None:
    """Without the injection the router's gradient is another one, so the tests above would notice its loss."""
    model, block = draw("mixture", 7, draw_config, build)
    x, outward, ctx = draw_input(model, 7, LENGTHS[0])
    routers = []
    for weight in (0.4, 0.0):
        uncut(block, x, outward, replace(ctx, balance_weight=weight))
        routers.append(gradients(block)["mlp.gate.weight"])
    assert (routers[0] - routers[1]).norm() > 1e-3


def states(block: Block, x: Tensor, ctx: Context) -> Iterator[NamedTuple]:
    """Yield what stands at each border."""
    state: Any = block.attend(x, ctx)
    yield state
    for step in (block.dispatch, block.compute, block.combine):
        yield (state := step(state))


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_a_state_has_no_more_floating_tensors_than_the_next_steps_need(kind: str, draw_config: Any, build: Any) -> None:
    model, block = draw(kind, 8, draw_config, build)
    x, _, ctx = draw_input(model, 8, LENGTHS[0])
    tokens, width, top_k = *x.shape, model.config.num_experts_per_tok
    of_tokens, rows = (tokens, width), (tokens * top_k, width)
    routed: dict[str, list[tuple[int, ...]]] = {
        "Attended": [(tokens, top_k)],
        "Dispatched": [rows, (tokens * top_k,)],
        "Computed": [rows],
        "Combined": [of_tokens],
    }
    for state in states(block, x, ctx):
        more = routed[type(state).__name__] if kind == "mixture" else []
        shapes = [tuple(tensor.shape) for tensor in tensors(state) if tensor.is_floating_point()]
        assert shapes == [of_tokens, of_tokens, *more], type(state)


def test_map_tensors_replaces_each_tensor_in_order_and_nothing_else(draw_config: Any, build: Any) -> None:
    model, block = draw("mixture", 9, draw_config, build)
    x, _, ctx = draw_input(model, 9, LENGTHS[0])
    for state in states(block, x, ctx):
        before = list(tensors(state))
        replaced: Any = map_tensors(lambda tensor: tensor.new_zeros(3), state)
        assert type(replaced) is type(state)
        assert [tensor.tolist() for tensor in tensors(replaced)] == [[0, 0, 0]] * len(before)
        assert all(map(torch.equal, tensors(map_tensors(lambda tensor: tensor, state)), before))
